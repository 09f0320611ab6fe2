"""Texts with known personal data and secrets, for the scrub's precision and recall; every value is made up by a seed.

`python tests/personal.py [spaCy model]` prints the table. {slots} are values to find; all other text must stay."""

import random
import re
import string
import sys
from collections import Counter

# Two halves, line by line: the patterns were mended on the first alone, the second only measured.
TEXTS = """
en|Please send the invoice to {email} as well, thanks.
en|My card {card} was charged twice for order TL-40213.
en|Hi, this is {person}, I can't log in since this morning.
en|Call me back on {phone}, any time before five.
en|Our IBAN is {iban}, please refund there.
en|SSN {ssn} is on the form you sent, is that needed?
en|The key {secret} stopped working after the update.
en|my password is {pass} and it still says wrong password
en|Requests from {ip} are blocked by your firewall.
en|The export lies under {url} but I get a 403.
en|{person} from accounting asked whether invoice INV-2093100 is paid.
en|cc {email}; {email} please, both need the summary
en|You can reach {person} at {phone} or {email}.
en|I pasted {secret} into the wrong window, please revoke it!!
en|Charge {card} from now on, the old one expired 09/27.
en|We changed banks: {iban} (was {iban}).
en|token: {secret} gives 401
en|export API_KEY={secret} && ./sync.sh
en|Look at {url} - the build shows the stack trace
en|Two factor codes go to {phone}, that is not my number any more.
en|Yours, {person}
en|Dear team, {person} left the company, remove the account {email}.
en|social security number: {ssn}. why do you ask for it?
en|Login from {ip} at 03:12, was that you?
en|card no. {card}, name on card {person}
en|the webhook posts to {url} and times out
en|I am {person}, customer since 2019, ticket #88213.
en|Authorization: Bearer {secret}
en|Fax: {phone} / Mail: {email}
en|pwd={pass} user=svc_export
en|Wire it to {iban}, reference RE-2026-114.
en|My colleague {person} and I share one seat.
en|Please delete everything you hold about {email}.
en|connection string {url} fails with timeout
en|he gave me {phone} as a contact, nobody picks up
en|ssh says: -----BEGIN OPENSSH PRIVATE KEY-----\\n{blob}\\n-----END OPENSSH PRIVATE KEY-----
en|PIN is {pin}, please unlock the terminal
en|{email} wrote on 3 May that order TL-61834 was shipped
en|Refund to the card ending 4242, order TL-30577.
en|The total is 1,299.00 EUR for 12 seats, invoice 2026-00418.
en|Version 10.4.12.3 crashes when I open the ledger.
en|I was born in 1984 and have used it since 2003-11-30.
en|Tracking number 00340434161094042557 shows no movement.
en|It is about ISBN 978-3-16-148410-0, page 212.
en|Error 0x80070057 in module a7f3c2e1-44b0-4f2e-9d4e-3b1f0c9d8e77.
en|commit 9fceb02d0ae598e95dc970b74767f19372d61af8 broke the sync
en|The meeting is on 14.03.2027 from 10:30 to 11:15, room 2.14.
en|Order 4006381333931 twice, please.
en|May I ask Vault to send a summary every Monday?
en|The password must have 12 characters, it says.
en|Your token is not accepted any more, it says.
en|Ledger shows 40 lines, Roster shows 38.
en|See https://help.example.com/articles/12-export for what I mean.
en|Case 2026/118-44, amount 3 200 450, cost centre 4711-0815.
en|Is Grace period 14 or 30 days? The Mark button does nothing.
en|Serial SN-48213-77120-A, firmware 3.2.1.
en|sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 does not match
en|We have 1200 staff in 48 countries, about 35 000 requests a day.
en|part no. 555-0199-22 is out of stock
en|timestamps like 1762073000123 are not readable
en|please use the ticket number 7731-2204-9918-0043 in the subject
en|{person} (VIP!) wants a call: {phone}
en|my ssn isn't {ssn}, someone mixed it up
en|AWS said {secret} is exposed on our repo
en|Kind regards {person}, Head of Payroll, {phone}
en|I typed {card} and the form said invalid number
en|fwd from {email}: the PDF is empty
en|proxy {url} refuses us
en|Our test server {ip} can't reach the API.
en|The secret was {pass}, I've changed it since
en|It was {person} who cancelled, not me.
de|Bitte die Rechnung an {email} schicken.
de|Ich heiße {person} und komme nicht in mein Konto.
de|Meine IBAN lautet {iban}, bitte dorthin erstatten.
de|Sie erreichen mich unter {phone} bis 17 Uhr.
de|Das Passwort ist {pass}, es geht trotzdem nicht.
de|Karte {card} wurde doppelt belastet, Bestellung TL-40213.
de|Der Schlüssel {secret} geht seit gestern nicht mehr.
de|Zugriffe von {ip} werden blockiert.
de|Unter {url} kommt nur eine leere Seite.
de|Frau {person} hat gekündigt, bitte Zugang sperren.
de|Rückruf bitte unter {phone} oder {email}
de|Neue Bankverbindung: {iban} ab 1.4.2027
de|Kennwort: {pass}
de|Mit freundlichen Grüßen, {person}
de|Auf der Rechnung zu TL-30577 fehlt unsere USt-IdNr. DE811907980.
de|Am 31.12.2026 um 10:30 Uhr stand das System 45 Minuten.
de|Kundennummer 100 200 3004, Vertrag V-2019-88213.
de|Der Betrag 12.345,67 EUR stimmt nicht, erwartet 12.354,67.
de|Aktenzeichen 12 O 345/26, Frist bis 15.01.2027
de|Das Passwort muss mindestens 8 Zeichen haben, steht dort.
de|Die Chargennummer 4711 0815 2026 fehlt im Export.
de|Version 2.14.0.7 stürzt beim Öffnen ab.
de|PLZ 10115, Postfach 12 34 56
de|Meine Nummer: {phone}. Bitte nicht weitergeben.
de|Herr {person} bittet um Rückruf.
de|der Server {url} ist nicht erreichbar
fr|Merci d'envoyer la facture à {email}.
fr|Je m'appelle {person}, je n'arrive plus à me connecter.
fr|Mon IBAN : {iban}, pour le remboursement.
fr|Rappelez-moi au {phone} avant midi.
fr|Mon mot de passe est {pass} et il est refusé.
fr|La carte {card} a été débitée deux fois.
fr|La clé {secret} ne marche plus.
fr|L'adresse {ip} est bloquée.
fr|Cordialement, {person}
fr|La commande TL-61834 du 12/03/2026 n'est pas arrivée.
fr|Le montant de 1 250,40 EUR ne correspond pas à la facture 2026-0091.
fr|Le lien {url} ne répond pas.
fr|Le numéro de série est 8841 2207 113, merci.
fr|SIRET 732 829 320 00074, TVA FR44732829320.
fr|Contactez {email} ou le {phone}.
es|Envíen la factura a {email}, por favor.
es|Soy {person} y no puedo entrar en mi cuenta.
es|El IBAN es {iban} para el reembolso.
es|Llámenme al {phone} por la tarde.
es|Mi contraseña es {pass} y no funciona.
es|La tarjeta {card} se cobró dos veces.
es|La clave {secret} ya no sirve.
es|El pedido TL-20981 del 03/11/2026 no llegó.
es|La factura 2026/00731 por 2.340,50 EUR está mal.
es|Nos bloquean desde {ip}.
es|El código de barras 8410076472946 no se lee.
es|Un saludo, {person}
es|mi número es {phone}, gracias
it|Mandate la fattura a {email}, grazie.
it|Sono {person}, non riesco ad accedere.
it|L'IBAN è {iban}, per il rimborso.
it|Chiamatemi al {phone}, prima delle 12.
it|La carta {card} è stata addebitata due volte.
it|La chiave {secret} non funziona più.
it|Il mio token: {secret}
it|L'ordine TL-77120 del 5 maggio non è arrivato.
it|La fattura 118/2026 di 980,00 EUR è doppia.
it|Partita IVA 12345670017, codice articolo 9788838668001.
it|{email} non riceve nulla
nl|Stuur de factuur naar {email}.
nl|Mijn naam is {person}, ik kan niet inloggen.
nl|Mijn IBAN is {iban}.
nl|Bel mij op {phone}.
nl|De kaart {card} is twee keer belast.
nl|Bestelling TL-55102 van 02-11-2026 is niet aangekomen.
nl|Het serienummer is 2210-8847-11.
nl|De server {url} geeft een fout.
pt|Enviem a fatura para {email}.
pt|Sou {person} e não consigo entrar.
pt|O IBAN é {iban}.
pt|Liguem para {phone}.
pt|O pedido TL-90011 de 12/10/2026 não chegou.
pt|A chave {secret} deixou de funcionar.
pl|Proszę wysłać fakturę na {email}.
pl|Nazywam się {person} i nie mogę się zalogować.
pl|Mój IBAN to {iban}.
pl|Proszę dzwonić pod {phone}.
pl|Zamówienie TL-31007 z 12.10.2026 nie dotarło.
pl|Karta {card} została obciążona dwa razy.
""".strip().splitlines()

FIRST = "Margaret Ingrid Tobias Chloé Lucía Giulia Sanne Joana Marek Henry Oluwaseun Priya Dmitri Anneliese Bastien Carmen".split()
LAST = "Thornbury Falkenrath Delacourt Echeverría Bellandi Vanderhoeven Carvalheira Kowalczuk Okonkwo Raghunathan Petersson Whitlock".split()
SITES = "brightwater-foods kestrel-print hofladen-sued atelier-lune panaderia-sol studio-verde".split()
PHONES = {"en": ("+1 (2##) ###-####", "0207 946 0###", "(212) 555-0###", "+44 7700 900###", "415-555-0###"),
          "de": ("+49 151 ########", "030 / 1234 ####", "0171-5550###", "+49 (0)89 ######"),
          "fr": ("+33 6 ## ## ## ##", "01 99 00 ## ##"), "es": ("+34 6## ### ###", "91 062 ## ##"), "it": ("+39 3## #######", "06 #### ####"),
          "nl": ("+31 6 ########", "020-#######"), "pt": ("+351 9## ### ###",), "pl": ("+48 5## ### ###", "22 ### ## ##")}  # fmt: skip
BANKS = {"DE": "#" * 18, "FR": "#" * 23, "ES": "#" * 20, "IT": "X" + "#" * 22, "NL": "INGB" + "#" * 10, "GB": "NWBK" + "#" * 14,
         "PT": "#" * 21, "PL": "#" * 24, "AT": "#" * 16}  # fmt: skip
KEYS = ("sk-*24", "ghp_*36", "AKIA^16", "AIza*35", "xoxb-#11-*24", "hf_*34", "glpat-*20", "sk_" + "live_*24", "*40", "eyJ*20.eyJ*30.*43")
URLS = ("https://svc:*12@git.{site}.com/x.git", "https://files.{site}.com/d?token=*20", "http://wiki.corp.internal/page/###",
        "postgres://app:*10@10.0.3.##:5432/main", "http://192.168.7.##:8080/status", "http://build.{site}.intranet/job/###")  # fmt: skip


class Values:
    """Made-up values of every type, in an order that the seed fixes."""

    def __init__(self, seed: int):
        self.rng, self.count = random.Random(seed), Counter()

    def fill(self, shape: str) -> str:
        """# a digit, ^n capitals and digits, *n letters and digits of all kinds."""
        pools = {"^": string.ascii_uppercase + string.digits, "*": string.ascii_letters + string.digits}
        shape = re.sub(r"([*^])(\d+)", lambda m: "".join(self.rng.choice(pools[m[1]]) for _ in range(int(m[2]))), shape)
        return re.sub("#", lambda m: self.rng.choice(string.digits), shape)

    def turn(self, kind: str, choices):
        """The choices one after the other."""
        self.count[kind] += 1
        return choices[self.count[kind] % len(choices)]

    def make(self, slot: str, language: str) -> str:
        """A value for one slot."""
        return getattr(self, f"_{slot.strip('_')}")(language)

    def _email(self, _):
        return f"{self.turn('first', FIRST).lower()}.{self.turn('last', LAST).lower()}@{self.turn('site', SITES)}.com".replace("é", "e").replace("í", "i")

    def _person(self, _):
        return f"{self.turn('first', FIRST)} {self.turn('last', LAST)}"

    def _phone(self, language):
        return self.fill(self.turn(f"phone {language}", PHONES[language]))

    def _card(self, _):
        body = self.fill(self.turn("card", ("4" + "#" * 14, "52" + "#" * 13, "37" + "#" * 12, "6011" + "#" * 11)))
        total = sum(n - 9 if n > 9 else n for n in (int(c) * (2 - i % 2) for i, c in enumerate(reversed(body))))
        number = body + str(-total % 10)
        return self.turn("card form", (number, " ".join(number[i : i + 4] for i in range(0, len(number), 4)), "-".join(number[i : i + 4] for i in range(0, len(number), 4))))

    def _iban(self, _):
        country = self.turn("iban", tuple(BANKS))
        body = self.fill(BANKS[country])
        check = 98 - int("".join(str(int(c, 36)) for c in f"{body}{country}00")) % 97
        number = f"{country}{check:02d}{body}"
        return self.turn("iban form", (number, " ".join(number[i : i + 4] for i in range(0, len(number), 4))))

    def _ssn(self, _):
        return f"{self.rng.randint(101, 665)}-{self.rng.randint(10, 99)}-{self.rng.randint(1000, 9999)}"

    def _ip(self, _):
        return f"{self.rng.randint(80, 200)}.{self.rng.randint(1, 250)}.{self.rng.randint(1, 250)}.{self.rng.randint(1, 250)}"

    def _url(self, _):
        return self.fill(self.turn("url", URLS).replace("{site}", self.turn("site", SITES)))

    def _secret(self, _):
        return self.fill(self.turn("secret", KEYS))

    def _pass(self, _):
        return self.fill(self.turn("pass", ("Sommer20##!", "hunter##", "Xk*6#", "blue-Whale-##")))

    def _pin(self, _):
        return self.fill("####")

    def _blob(self, _):
        return self.fill("*70")


NAMES = {"pass": "SECRET", "pin": "SECRET", "blob": "SECRET"}


def labelled(half: int | None = None, seed: int = 7) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """(text, [(start, end, type)]) of all texts, or of the first (0) or second (1) half."""
    values, found = Values(seed), []
    for number, line in enumerate(TEXTS):
        language, _, shape = line.partition("|")
        text, marks = "", []
        for part in re.split(r"(\{\w+\})", shape.replace("\\n", "\n")):
            if slot := re.fullmatch(r"\{(\w+)\}", part):
                part = values.make(slot[1], language)
                marks.append((len(text), len(text) + len(part), NAMES.get(slot[1], slot[1].upper())))
            text += part
        if half is None or number % 2 == half:
            found.append((text, marks))
    return found


def measure(spans, half: int | None = None, missed: list | None = None) -> dict[str, Counter]:
    """Per type how many values were planted, found (covered whole) and wrongly found (type "wrong" of what was said)."""
    found: dict[str, Counter] = {}
    for text, marks in labelled(half):
        said = spans(text)
        for start, end, kind in marks:
            hit = any(a <= start and end <= b for a, b, _ in said)
            found.setdefault(kind, Counter()).update(planted=1, found=hit)
            if not hit and missed is not None:
                missed.append(("missed", kind, text))
        for a, b, kind in said:
            wrong = not any(a < end and start < b for start, end, _ in marks)
            found.setdefault(kind, Counter()).update(said=1, wrong=wrong)
            if wrong and missed is not None:
                missed.append(("wrong", kind, text))
    return found


def table(found: dict[str, Counter]) -> str:
    """Markdown: a line per type, and all together."""
    total = sum(found.values(), Counter())
    lines = ["| type | values | recall | finds | precision |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, c in [*sorted(found.items()), ("all", total)]:
        recall = f"{c['found'] / c['planted']:.1%}" if c["planted"] else "-"
        precision = f"{1 - c['wrong'] / c['said']:.1%}" if c["said"] else "-"
        lines.append(f"| {kind} | {c['planted']} | {recall} | {c['said']} | {precision} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from slm.production.scrub import guesser, spans
    from slm.settings import Settings

    own = {"curate": {"spacy_models": {"en": sys.argv[1]}}, "production": {"scrub": "presidio"}} if sys.argv[1:] else {}
    guess = guesser(Settings.model_validate(own)) if own else None
    for name, half in (("first half", 0), ("second half", 1), ("all", None)):
        print(f"\n{name}, {len(labelled(half))} texts\n\n{table(measure(lambda text: spans(text, guess), half))}")
