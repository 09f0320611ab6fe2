"""Support messages with planted faults at known rates: every row is a pure function of seed and position, so that any
earlier row can be made again and a million of them never stand in memory."""

import hashlib
import json
import random
import re
from functools import lru_cache
from pathlib import Path

VERSION = 1  # raise when the rows change: finished parts are then measured again
BLOCK, FILE_ROWS = 1000, 50_000
NEAR, CONTROL, REWORDED = (0.66, 0.95), (0.15, 0.45), 0.45  # true Jaccard of word 3-shingles with the row copied from
# fault: (rows per thousand, gates that are right to refuse it)
FAULTS = {
    "broken line": (4, ("json_validity",)), "broken answer": (4, ("json_validity",)),
    "schema": (8, ("schema_validity",)), "prose round the answer": (5, ("contract_validity",)),
    "made-up order": (3, ("check",)),
    "leaked instruction": (8, ("leaked_instructions",)),
    "personal data": (6, ("personal_data",)), "phone number": (2, ("personal_data",)),
    "too long": (4, ("length",)),
    "evaluation copy": (3, ("evaluation_leakage",)), "evaluation near copy": (4, ("evaluation_leakage",)),
    "evaluation row inside": (3, ("evaluation_leakage",)),
    "contradicting label": (6, ("label_consistency",)), "contradicted": (6, ("label_consistency",)),
    "exact duplicate": (20, ("duplicates",)), "near duplicate": (30, ("duplicates",)),
    "paraphrase": (10, ("duplicates",)), "too short": (3, ("trivial",)), "repetitive": (3, ("trivial",)),
    "unfilled slot": (3, ("trivial",)), "refilled template": (4, ("trivial", "duplicates")),
    "control": (10, ()),
}  # fmt: skip
COPIES = ("exact duplicate", "near duplicate", "paraphrase", "refilled template", "contradicting label", "control")
OPENERS = {
    "billing": ("high", [
        "On {date} you charged {amount} for {product} although {name} had paid it in {city}.",
        "The invoice over {amount} that {company} got on {date} shows the wrong VAT number.",
        "{name} sees two payments of {amount} on the statement of {date}, one of them for {product}."]),
    "account_access": ("high", [
        "{name} from {company} cannot sign in to {product} since {date}, the code never arrives.",
        "We lost the phone of {name} in {city} and with it every way into {product}.",
        "The invitation that {company} sent {name} on {date} says it has expired."]),
    "bug": ("normal", [
        "{product} shows {number} entries for {company} where {name} typed only one on {date}.",
        "Since {date} the export of {product} stops at row {number}, {name} tried it in {city} too.",
        "When {name} opens the list of {company}, {product} jumps back to the first page."]),
    "outage": ("urgent", [
        "Nobody at {company} reaches {product} since {time}, {number} people in {city} are waiting.",
        "{product} answers with error {number} for all of us, says {name} of {company}."]),
    "how_to": ("low", [
        "How does {name} move {number} records from {product} to the account of {company}?",
        "Where in {product} do I set the time zone of {city} for {company}?"]),
    "feature_request": ("low", [
        "It would save {company} about {amount} a month if {product} could sort by {city}.",
        "{name} wishes for a dark view of {product}, like the one {company} has had since {date}."]),
    "cancellation": ("normal", [
        "Please end the plan of {company} on {date}, {name} has moved to {city} and needs no {product}.",
        "We do not want {product} renewed for {amount} on {date}, regards from {name}."]),
    "data_privacy": ("normal", [
        "{name} asks for a copy of all data that {product} holds on {company} in {city}.",
        "Delete everything about {name} by {date}, as the office in {city} demands of {company}."]),
    "not_support": ("low", [
        "{company} in {city} sells {number} fine chairs and {name} would love to show you some.",
        "{name} read about you in {city} and wants to apply at {company} on {date}."]),
}  # fmt: skip
JOINS = [
    "What I typed was:",
    "Last thing entered:",
    "The note says",
    "My colleague wrote",
    "In the log stands",
    "Before that:",
]
CLOSERS = [
    "Regards, {name}, {company}", "Thanks, {name} ({city})", "{name}, {company}, {city}", "Yours, {name}",
    "Call me after {time}, {name}", "Sent from {city} by {name}",
]  # fmt: skip
SYNONYMS = dict(pair.split(":") for pair in (
    "add:put play:start book:reserve find:locate show:display rate:score give:hand my:our the:that please:kindly "
    "restaurant:diner weather:forecast song:track music:tunes playlist:list movie:film movies:films want:wish need:require "
    "tell:inform what:which for:toward near:around people:persons table:spot album:record artist:musician book:volume "
    "typed:entered colleague:coworker note:memo wrote:penned says:states since:from cannot:can't regards:greetings thanks:cheers "
    "see:view look:search next:following current:present stars:points points:marks city:town theatre:cinema schedule:timetable"
).split())  # fmt: skip
# What generators let slip; the last is a run of the project's own prompt.
LEAKS = [
    "As requested in the generation instructions, here is the next one: ", "Here is a realistic example of the category: ",
    "(synthetic data, kind: near-miss) ", "This example tests whether the model stays calm. ", "Difficulty: hard. ",
    "Here's a training example with a frustrated customer: ", "Note: this sample is meant to be adversarial. ",
    "As an AI language model I made this ticket up. ", "The following message should be labeled as billing: ",
    "According to the schema that I was given: ", "Generated message no. 12: ", "Sure! Below is a synthetic customer message. ",
    "Each situation is its own: other people, other reasons, other sentence shapes. ",
]  # fmt: skip
PRODUCTS = ("Ledger", "Dispatch", "Vault", "Roster")
KINDS = ("canonical", "production_like", "boundary", "negative", "adversarial", "style", "schema_repair")
MONTHS = "January February March April May June July August September October November December".split()
_WORD = re.compile(r"\w+")


def shingles(text: str) -> frozenset:
    """Runs of three words, lower case."""
    words = _WORD.findall(text.lower())
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def jaccard(a: str, b: str) -> float:
    """Of the word 3-shingles of two texts."""
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


class Rows:
    """`rows[n]` for n in range(total): (line without its end, user text or None, fault or None, twin or None, Jaccard)."""

    def __init__(self, snips: Path, evaluation: Path, total: int, seed: int = 0):
        if total % BLOCK:
            raise SystemExit(f"--rows {total}: use a multiple of {BLOCK}.")
        self.total, self.seed, self.shift = total, seed, total // BLOCK // 2
        self.requests, values = [], {}
        for part in ("train", "valid"):
            for line in (snips / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                slots = [(k, v) for k, v in record["arguments"].items() if isinstance(v, str) and v in record["text"]]
                self.requests.append((record["text"].strip(" .?!"), slots))
                for slot, value in slots:
                    values.setdefault(slot, {})[value] = None
        self.values = {slot: list(found) for slot, found in values.items()}
        every = {w for text, _ in self.requests for w in _WORD.findall(text.lower()) if len(w) > 2 and w.isalpha()}
        self.words = sorted(every)
        self.items = sorted(
            {
                v.lower()
                for found in self.values.values()
                for v in found
                if re.fullmatch(r"[a-z]{3,}( [a-z]{3,})?", v.lower())
            }
        )
        self.cities = [v for v in self.values["city"] if v.replace(" ", "").isalpha()]
        self.known = []
        for name in ("dev", "test", "adversarial", "golden"):
            for line in (evaluation / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                text = "\n".join(m["content"] for m in record["messages"] if m["role"] == "user")
                self.known.append((text, record["messages"][-1]["content"], len(_WORD.findall(text))))

    @lru_cache(maxsize=4)  # noqa: B019 - one instance a run
    def layout(self, block: int) -> tuple[dict, dict]:
        """({place: (fault, number of its kind)}, {(fault, number): (place of a twin in this block, of one kept for later)})."""
        rng = random.Random(f"layout {self.seed} {block}")
        free = rng.sample(range(BLOCK), BLOCK)
        faults, twins = {}, {}
        for fault, (rate, _) in FAULTS.items():
            for number in range(rate if fault != "contradicted" else 0):
                if fault in COPIES:
                    twin, place = sorted((free.pop(), free.pop()))
                    twins[fault, number] = (twin, free.pop())
                else:
                    place = free.pop()
                faults[place] = (fault, number)
        return faults, twins

    def twin_of(self, n: int, fault: str, number: int) -> int:
        """The row that row `n` copies: in the second half of the data every other copy is from half the data before."""
        block = n // BLOCK
        if self.shift and block >= self.shift and number % 2:
            return (block - self.shift) * BLOCK + self.layout(block - self.shift)[1][fault, number][1]
        return block * BLOCK + self.layout(block)[1][fault, number][0]

    def copied(self, n: int) -> str | None:
        """The fault for which another row copies row `n`, or None."""
        block, place = divmod(n, BLOCK)
        for (fault, number), (own, later) in self.layout(block)[1].items():
            far = self.shift and number % 2
            if place == own and not (far and block >= self.shift):
                return fault
            if place == later and far and block + self.shift < self.total // BLOCK:
                return fault
        return None

    def request(self, rng) -> str:
        """One request of a real person, its slots filled anew."""
        text, slots = rng.choice(self.requests)
        for slot, value in slots:
            text = text.replace(value, rng.choice(self.values[slot]), 1)
        return text

    def base(self, n: int) -> tuple[list[str], dict, random.Random]:
        """The sentences of row `n`, its answer, and the generator that goes on from there."""
        rng = random.Random(f"row {self.seed} {n}")
        category = rng.choice(list(OPENERS))
        priority, openers = OPENERS[category]
        product = rng.choice(PRODUCTS)
        filled = {
            "product": product, "name": self.name(rng), "company": f"{self.name(rng).split()[1]} {rng.choice(self.words).title()}",
            "city": rng.choice(self.cities), "amount": f"{rng.randint(3, 4000)}.{rng.randint(0, 99):02} {rng.choice(('EUR', 'USD', 'GBP'))}",
            "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}", "time": f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}", "number": rng.randint(2, 9999),
        }  # fmt: skip
        ours = category != "not_support"
        opener = rng.choice(openers)
        order = f"TL-{rng.randint(10000, 99999)}" if ours and rng.random() < 0.25 else None
        refund = category in ("billing", "cancellation") and rng.random() < 0.4
        parts = [opener.format(**filled)]
        parts += [f"{self.request(rng)}.", f"{rng.choice(JOINS)} {self.request(rng)}.", f"{self.request(rng)}."]
        parts += [f"This is about order {order}."] * bool(order) + ["I want that money back."] * refund
        parts.append(rng.choice(CLOSERS).format(**filled))
        value = {
            "category": category, "priority": priority, "product": product.lower() if ours and "{product}" in opener else None,
            "order_id": order, "refund_requested": refund, "language": "en",
        }  # fmt: skip
        return parts, value, rng

    def name(self, rng) -> str:
        """Given name and surname out of syllables: hundreds of thousands of them."""
        syllables = "ba do ka li mo ne ra si tu ve wo ya zen lor mir dan fel gus hol jun".split()
        return " ".join("".join(rng.choices(syllables, k=rng.choice((2, 3)))).title() for _ in range(2))

    def template(self, n: int, copy: bool = False) -> tuple[str, dict]:
        """An order list: the things are those of row `n`, the quantities a copy's own."""
        rng, other = random.Random(f"list {self.seed} {n}"), random.Random(f"list {self.seed} {n} {copy}")
        lines = ", ".join(f"{other.randint(2, 999)} {rng.choice(self.items)}" for _ in range(rng.randint(8, 12)))
        value = {
            "category": "how_to",
            "priority": "low",
            "product": None,
            "order_id": None,
            "refund_requested": False,
            "language": "en",
        }
        return f"{lines}, {other.randint(2, 999)} in all", value

    def near(self, rng, text: str, low: float, high: float) -> tuple[str, float]:
        """A copy with a few words changed, left out or put in, whose true Jaccard lies between `low` and `high`."""
        for _ in range(200):
            words = text.split(" ")
            for _ in range(rng.choice((1, 1, 2, 2, 3))):
                place = rng.randrange(len(words))
                if any(c.isdigit() for c in words[place]):
                    continue
                kind = rng.random()
                words[place : place + 1] = (
                    [rng.choice(self.words)]
                    if kind < 0.7
                    else []
                    if kind < 0.85
                    else [words[place], rng.choice(self.words)]
                )
            found = " ".join(words)
            similarity = jaccard(text, found)
            if low <= similarity <= high:
                return found, similarity
        found = f"{text} {rng.choice(self.words)}"  # too short to change a word within the bounds
        return found, jaccard(text, found)

    def control(self, rng, parts: list[str]) -> tuple[str, float]:
        """A row that shares whole sentences with another, but is not the same."""
        text = " ".join(parts)
        for _ in range(200):
            mine = list(parts)
            free = [place for place, part in enumerate(mine) if "TL-" not in part]
            for place in rng.sample(free, k=len(mine) // 2):
                mine[place] = (
                    f"{self.request(rng)}, {self.name(rng)} said."
                    if place
                    else f"{self.name(rng)} writes: {self.request(rng)}."
                )
            found = " ".join(mine)
            similarity = jaccard(text, found)
            if CONTROL[0] <= similarity <= CONTROL[1]:
                return found, similarity
        return found, similarity

    def paraphrase(self, rng, parts: list[str]) -> tuple[str, float]:
        """The same said otherwise: synonyms, sentences in another order, clauses turned round."""
        text, mine = " ".join(parts), []
        for part in rng.sample(parts, len(parts)):
            words = [SYNONYMS.get(w.lower(), w) for w in part.rstrip(".").split(" ")]
            mine.append(words)
        for size in (8, 6, 5, 4, 3, 2):
            turned = []
            for words in mine:
                cuts = [words[i : i + size] for i in range(0, len(words), size)]
                turned.append(
                    " ".join(
                        w
                        for cut in (cuts[1:] + cuts[:1] if len(cuts) < 3 else rng.sample(cuts, len(cuts)))
                        for w in cut
                    )
                )
            found = ". ".join(turned) + "."
            similarity = jaccard(text, found)
            if similarity <= REWORDED:
                break
        return found, similarity

    def __getitem__(self, n: int) -> tuple[str, str | None, str | None, int | None, float | None]:
        fault, number = self.layout(n // BLOCK)[0].get(n % BLOCK, (None, 0))
        twin, similarity = (self.twin_of(n, fault, number) if fault in COPIES else None), None
        parts, value, rng = self.base(n if twin is None else twin)
        if twin is not None:
            rng = random.Random(f"copy {self.seed} {n}")
        elif fault is None and (role := self.copied(n)):
            if role == "refilled template":
                return self.line(n, *self.template(n)), self.template(n)[0], None, None, None
            fault = "contradicted" if role == "contradicting label" else None
        text = " ".join(parts)
        answer = json.dumps(value, separators=(",", ":"))
        if fault == "broken answer":
            answer = answer[: rng.randrange(10, len(answer) - 1)]
        elif fault == "schema":
            wrong = dict(value)
            how = number % 4
            if how == 0:
                wrong["category"] = rng.choice(("refund", "sales", "Billing"))
            elif how == 1:
                wrong.pop(rng.choice(("priority", "language", "order_id")))
            elif how == 2:
                wrong["confidence"] = 0.9
            else:
                wrong["refund_requested"] = "no"
            answer = json.dumps(wrong, separators=(",", ":"))
        elif fault == "prose round the answer":
            answer = rng.choice(
                ("Sure, here it is: {}", "```json\n{}\n```", "{}\nLet me know if you need more.")
            ).replace("{}", answer)
        elif fault == "made-up order":
            text = re.sub(r"TL-\d+", "unknown", text)
            value = {**value, "category": "bug", "priority": "normal", "order_id": f"TL-{rng.randint(10000, 99999)}"}
            answer = json.dumps(value, separators=(",", ":"))
        elif fault == "leaked instruction":
            text = rng.choice(LEAKS) + text
        elif fault == "personal data":
            text += " " + (self.card, self.iban, self.mail, self.key, self.password)[rng.randrange(5)](rng)
        elif fault == "phone number":
            text += f" My number is {rng.choice(('+49 171', '+1 415', '+44 7911'))} {rng.randint(200, 999)} {rng.randint(2000, 9999)}."
        elif fault == "too long":
            text += " " + ". ".join(self.request(rng) for _ in range(110))
        elif fault and fault.startswith("evaluation"):
            text, answer, similarity = self.evaluation(rng, fault, parts)
        elif fault == "contradicting label":
            others = [c for c in OPENERS if c not in (value["category"], "not_support")]
            changed = {**value, "category": rng.choice(others)}
            text, similarity = self.near(rng, text, 0.84, 0.99)
            answer = json.dumps(changed, separators=(",", ":"))
        elif fault == "exact duplicate":
            text, similarity = (text, text.upper(), text.replace(".", "!").replace(",", " -"))[number % 3], 1.0
        elif fault == "near duplicate":
            text, similarity = self.near(rng, text, *NEAR)
        elif fault == "control":
            text, similarity = self.control(rng, parts)
        elif fault == "paraphrase":
            text, similarity = self.paraphrase(rng, parts)
        elif fault == "refilled template":
            text, value = self.template(twin, copy=True)
            similarity, answer = jaccard(text, self.template(twin)[0]), json.dumps(value, separators=(",", ":"))
        elif fault == "too short":
            text, answer = f"x{n}", json.dumps({**value, "order_id": None})
        elif fault == "repetitive":
            answer = json.dumps({**value, "order_id": None})
            text = " ".join([rng.choice(self.words), rng.choice(self.words)] * rng.randint(8, 20))
        elif fault == "unfilled slot":
            text = f"Dear [CUSTOMER NAME], {text}"
        line = self.line(n, text, answer)
        if fault == "unfilled slot":  # adversarial rows may well hold one
            line = re.sub(r'"kind": "\w+"', '"kind": "canonical"', line)
        if fault == "broken line":
            line = line[: rng.randrange(20, len(line) - 2)]
        return line, text, fault, twin, similarity

    def line(self, n: int, text: str, answer: str | dict) -> str:
        """Row `n` as it stands in a batch."""
        if isinstance(answer, dict):
            answer = json.dumps(answer, separators=(",", ":"))
        draw = int(hashlib.md5(f"{self.seed} {n}".encode()).hexdigest()[:8], 16)
        found = re.search(r'"category": ?"(\w+)"', answer)
        meta = {
            "category": found.group(1) if found else "all", "kind": KINDS[draw % 7], "difficulty": ("easy", "medium", "hard")[draw % 3],
            "language": "en", "source": "teacher", "group": f"g{n:07}", "provenance": {"batch": f"batch_{n // FILE_ROWS:03}"},
        }  # fmt: skip
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return json.dumps({"id": f"r{n:07}", "messages": messages, "meta": meta}, ensure_ascii=False)

    def evaluation(self, rng, fault: str, parts: list[str]) -> tuple[str, str, float]:
        """A row of the evaluation sets: as it is, a few words changed, or in the middle of other text."""
        text, answer, _ = rng.choice([k for k in self.known if k[2] >= (2 if fault == "evaluation copy" else 14)])
        if fault == "evaluation copy":
            return rng.choice((text, text.upper(), text + "!")), answer, 1.0
        if fault == "evaluation near copy":
            found, similarity = self.near(rng, text, *NEAR)
            return found, answer, similarity
        found = f"{parts[1]} {text} {self.request(rng)}."
        return found, answer, jaccard(text, found)

    @staticmethod
    def card(rng) -> str:
        """A number with a right check digit (Luhn)."""
        digits = [4, *(rng.randrange(10) for _ in range(14))]
        doubled = sum(d if place % 2 else (2 * d - 9 if d > 4 else 2 * d) for place, d in enumerate(digits))
        text = "".join(map(str, [*digits, -doubled % 10]))
        return f"My card is {' '.join(text[i : i + 4] for i in range(0, 16, 4))}."

    @staticmethod
    def iban(rng) -> str:
        """A German account number with right check digits (mod 97)."""
        account = f"{rng.randrange(10**18):018}"
        return f"Pay it to DE{98 - int(account + '131400') % 97:02}{account}."

    @staticmethod
    def mail(rng) -> str:
        """An address at a domain that can exist."""
        return f"Write to {rng.choice('abcdefgh')}{rng.randrange(10**4)}@bakery{rng.randrange(10**3)}.co.uk please."

    @staticmethod
    def key(rng) -> str:
        """What looks like an API key."""
        return "My token is sk-" + "".join(rng.choices("abcdefghijkmnpqrstuvwxyzABCDEFGH23456789", k=28))

    @staticmethod
    def password(rng) -> str:
        """A password that says what it is."""
        return f"The password is {''.join(rng.choices('abcdefghkmnpqrstuvwxyz', k=7)).title()}{rng.randint(1000, 9999)}!{rng.choice('XYZ')}x."

    def write(self, folder: Path) -> None:
        """batch_NNN.jsonl files of 50,000 rows, and truth.jsonl with every planted row: n, fault, twin, Jaccard."""
        folder.mkdir(parents=True, exist_ok=True)
        batch = None
        with (folder / "truth.jsonl").open("w", encoding="utf-8") as truth:
            for n in range(self.total):
                if n % FILE_ROWS == 0:
                    if batch:
                        batch.close()
                    batch = (folder / f"batch_{n // FILE_ROWS:03}.jsonl").open("w", encoding="utf-8")
                line, _, fault, twin, similarity = self[n]
                batch.write(line + "\n")
                if fault:
                    similarity = similarity and round(similarity, 3)
                    truth.write(json.dumps({"n": n, "fault": fault, "twin": twin, "jaccard": similarity}) + "\n")
            batch.close()
