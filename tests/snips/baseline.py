"""The rule program for SNIPS: cue words choose the tool, patterns and short word lists cut out the slots."""

import re

N = r"(?:\d+|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|(?:twen|thir|for|fif)ty(?:[ -](?:one|two|three|four|five|six|seven|eight|nine))?)"
UNIT = r"(?:second|minute|hour|day|week|month|year)s?"
MONTH = r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
DAY = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
WHEN = (
    rf"(?:in (?:an? |half an? |{N}(?: and a half)? ){UNIT}|(?:an? |{N} ){UNIT} from now|(?:this|next|the next|later this|the) {UNIT}"
    rf"|{MONTH}\.? ?\d*(?:st|nd|rd|th)?(?:,? \d{{4}})?|\d+(?:st|nd|rd|th) of {MONTH}|\d+/\d+/\d+|{DAY}|today|tomorrow|tonight|now"
    rf"|(?:\d{{1,2}}(?::\d\d)? ?[ap]\.?m\.?|\d{{1,2}}:\d\d|{N} o['’ ]?clock|\w+ o['’]clock)|noon|midday|midnight|sunrise|sunset|lunch(?:time)?"
    r"|breakfast|brunch|dinner|supper|meal|christmas|easter)\b"
)
NEAR = r"(?:within walking distance|(?:with)?in the same area|not far|close[ -]by|nearby|neighbou?ring|faraway|distant|nearest|closest|in the (?:neighbou?rhood|area)|around here|around|close|near|far)\b"
SERVICE = r"(?:netflix|itunes|groove ?shark|google music|deezer|youtube|zvooq|spotify|last ?fm|pandora|slacker|iheart|vimeo)\b"
MUSIC = r"(?:theme song|sound ?track|song|album|track|chant|ballad|tune|record|symphony|ep|melody|movement|theme|concerto)"
CONDITION = r"(?:blizzard|rain(?:y|fall)?|cloud(?:y)?|wind(?:y)?|snow(?:y|storm|fall)?|overcast|hail|storm(?:y)?|sun(?:ny)?|depression|humid(?:ity)?|fog(?:gy)?)\b"
HEAT = r"(?:cold(?:er)?|chill(?:y|ier)|warm(?:er)?|hot(?:ter)?|freezing|temperate)\b"
PLACE = r"(?:restaurant|bar|brasserie|pub|taverna|food court|cafeteria|food truck|tavern|diner|gastropub|tea house|bakery|steakhouse|joint|bistro|pizzeria|cafe|oyster bar|churrascaria|fast food|delicatessen|osteria|coffeehouse)"
FACILITY = r"(?:pool|parking|spa|indoor|internet|wi-?fi|outdoor|smoking room)"
WORK = r"(?:tv show|saga|trailer|photograph|television show|show|picture|game|tv series|painting|novel|soundtrack|book|song|movie|video game|album)"
BOOK = r"(?:book|essay|textbook|novel|album)"
CINEMA = r"(?:movie house|cinema|movie theatre)"
US = "alabama alaska arizona arkansas california colorado connecticut delaware florida georgia hawaii idaho illinois indiana iowa kansas kentucky louisiana maine maryland massachusetts michigan minnesota mississippi missouri montana nebraska nevada ohio oklahoma oregon pennsylvania tennessee texas utah vermont virginia washington wisconsin wyoming"
LANDS = "afghanistan albania algeria andorra angola antarctica argentina armenia aruba australia austria azerbaijan bahamas bahrain bangladesh barbados belarus belgium belize benin bermuda bhutan bolivia botswana brazil brunei bulgaria burundi cambodia cameroon canada chad chile china colombia comoros congo croatia cuba curacao cyprus denmark djibouti dominica ecuador egypt eritrea estonia ethiopia fiji finland france gabon gambia georgia germany ghana gibraltar greece greenland grenada guadeloupe guam guatemala guernsey guinea guyana haiti honduras hungary iceland india indonesia iran iraq ireland israel italy jamaica japan jersey jordan kazakhstan kenya kiribati kosovo kuwait kyrgyzstan laos latvia lebanon lesotho liberia libya liechtenstein lithuania luxembourg macao macedonia madagascar malawi malaysia maldives mali malta martinique mauritania mauritius mayotte mexico micronesia moldova monaco mongolia montenegro montserrat morocco mozambique myanmar namibia nauru nepal netherlands nicaragua niger nigeria norway oman pakistan palau palestine panama paraguay peru philippines poland portugal qatar romania russia rwanda samoa senegal serbia seychelles singapore slovakia slovenia somalia spain sudan suriname swaziland sweden switzerland syria taiwan tajikistan tanzania thailand togo tokelau tonga tunisia turkey turkmenistan tuvalu uganda ukraine uruguay uzbekistan vanuatu venezuela vietnam yemen zambia zimbabwe"
COUNTRY = rf"(?:{'|'.join(LANDS.split())}|united (?:kingdom|states(?: of america)?|arab emirates)|(?:north|south) korea|south africa|new (?:zealand|caledonia)|el salvador|costa rica|saudi arabia|sri lanka|east timor|sierra leone|ivory coast|burkina faso|papua new guinea|cape verde|[a-z]+ (?:and [a-z]+ )?islands?|saint \w+|western sahara|dominican republic|czech republic|puerto rico|french \w+|hong kong)"
STATE = rf"(?:{'|'.join(US.split())}|(?:north|south) (?:carolina|dakota)|new (?:york|mexico|jersey|hampshire)|rhode island|west virginia|american samoa|northern mariana islands|[A-Z]{{2}})"


def find(pattern: str, text: str, flags=re.I) -> str | None:
    """The first group of the first match, trimmed; None without one."""
    match = re.search(pattern, text, flags)
    return (match[1].strip(" ,.?!'\"") or None) if match else None


def tool_of(low: str) -> str:
    """The tool by cue words; the order is the order of trust."""
    if re.search(r"\b(weather|forecast|humid|temperature)\b", low) or re.search(rf"\b(is|will|be|get|it) .*\b({HEAT}|{CONDITION})", low):
        if not re.search(r"\b(play|add|rate|movie|find)\b", low):
            return "GetWeather"
    if re.search(r"\b(rate|rating|stars|points|out of (6|six)|of 6)\b|\bgive .*\b(zero|one|two|three|four|five|[0-5])\b", low):
        return "RateBook"
    if re.search(r"\bplaylists?\b", low) and re.search(r"\b(add|put|include|want|like)\b", low) or re.match(r"(please )?(can you )?(add|put)\b", low):
        return "AddToPlaylist"
    if re.search(rf"\b(book|reserv\w*|table|seats?|eat|spot)\b.*\b({PLACE}s?|for|in|at)\b", low) and not re.search(
        r"\bthe (book|novel)\b|called|\b(find|search|look)\b.*\bbook\b", low
    ):
        return "BookRestaurant"
    if re.search(rf"\b({CINEMA}s?|theat(re|er)s?|cinemas?|movie (times|schedules?)|schedules?|showtimes|showing|films|animated movies|movies|cineplex|playing|screen\w*)\b|what time|where can i see|when (is|will|can)", low):
        return "SearchScreeningEvent"
    if re.search(rf"\b(hear|listen|music|songs|{SERVICE})", low) or re.match(r"(please |can you |i want to )?play\b", low):
        if not re.search(rf"\b(tv|show|game|trailer|saga|movie|painting|television|{WORK} (called|titled))\b", low):
            return "PlayMusic"
    return "SearchCreativeWork"


def predict(text: str) -> dict:
    """One request -> one call."""
    tool = tool_of(text.lower())
    found = {name: value for name, value in SLOT_RULES[tool](text).items() if value}
    return {"tool": tool, "arguments": found}


def places(text: str) -> dict:
    """City, state, country or sight in what follows `in`, `for`, `at` …, once times and party sizes are taken out."""
    bare = re.sub(rf"\b(?:on|at|for|in|the)? ?{WHEN}|\b(?:party )?(?:for|of) {N}(?: people)?\b|{NEAR}(?: from)?", "|", text, flags=re.I)
    for chunk in re.findall(r"\b(?:in|for|at|of|near|from|to|around) (?:the )?([^|?]+?)(?= (?:in|for|at|with|that|which|on)\b|[|?]|\.?$)", bare, re.I):
        where = chunk.strip(" ,.")
        if not where or re.match(rf"(?:an?|my|me|party|people|{N}|{PLACE}s?|{FACILITY}|table|weather|forecast)\b", where, re.I):
            continue
        if re.search(r"\b(?:park|forest|reserve|monument|refuge|trail|beach|area|national|sanctuary|memorial)\b", where, re.I):
            return {"geographic_poi": where}
        for name, pattern in (("state", STATE), ("country", COUNTRY)):
            for tail in (where, where[:1].upper() + where[1:]):
                parted = re.fullmatch(rf"(?:(.+?),? )?({pattern})", tail, re.I if len(where.split()[-1]) > 2 else 0)
                if parted:
                    return {"city": (parted[1] or "").strip(" ,"), name: parted[2]}
        city, comma, land = where.partition(", ")
        return {"city": city, "country": land} if comma else {"city": where}
    return {}


def playlist(text: str) -> dict:
    owner = find(r"\b(my|\w+['’]s)\b(?= .*| playlist)", text.split(" to ")[-1]) or find(r"\b(my)\b", text)
    target = r"(?:to|onto|on|in|into) (?:the |a )?(?:my |\w+['’]s )?(?:playlist |album )?(?:called |named |titled )?"
    name = find(rf".*\b{target}(.+?)(?: playlists?| list| album)?[.?]?$", text)
    what = find(r"\b(?:add|put|include|have)\s+(.+?)\s+(?:to|onto|on|in|into)\b", text) or ""
    item = find(r"\b(artist|album|song|track|tune)s?\b", what)
    by = find(r"\bby (.+)", what)
    rest = re.sub(r"^(?:the (?=artist|album|song|track|tune)|an? |this |another |some )|\b(?:artist|album|song|track|tune)s?\b|\bby .+", "", what, flags=re.I).strip()
    rest = re.sub(r"^(?:the|this|an?|another)$", "", rest.strip(), flags=re.I)
    if item and rest:
        return {"artist": by or rest, "music_item": item, "playlist_owner": owner, "playlist": name}
    return {"entity_name": None if item else rest, "artist": by, "music_item": item, "playlist_owner": owner, "playlist": name}


def restaurant(text: str) -> dict:
    where = {k: v for k, v in places(text).items() if k in ("city", "state", "country")}
    return {
        "sort": find(r"\b(highly rated|top-rated|best|popular)\b", text),
        "restaurant_name": find(r"\b(?:at|for) (?:the )?((?!.*restaurant)[A-Z][\w'’&-]+(?: [A-Z][\w'’&-]+)+)", text, 0) if not re.search(rf"\b(?:{PLACE})\b", text) else None,
        "cuisine": find(rf"\b(?:an?|serves?|serving|some) ((?:\w+ )?\w+(?:an|ish|ese|ean|ole|her|lal))\b (?:food|cuisine|{PLACE})", text),
        "restaurant_type": find(rf"\b({PLACE})s?\b", text),
        "party_size_description": find(r"\bfor ((?:my|me|\w+,? \w+ and)\b.+?)(?: (?:at|in|on|for)\b|[.?]?$)", text),
        "spatial_relation": find(rf"\b({NEAR})", text),
        "party_size_number": find(rf"\b(?:for|of|table for) ({N})\b(?! {UNIT})(?! ?[ap]\.?m)", text) or find(rf"\b({N}) people", text),
        "served_dish": find(r"\b(?:serves?|serving|eat|some) ((?!at|in)[\w ]+?)(?: (?:at|in|for|near)\b|[.?]?$)", text),
        "facility": find(rf"\b({FACILITY})\b", text),
        "timeRange": find(rf"\b({WHEN})", text),
        **where,
    }


def weather(text: str) -> dict:
    here = find(r"\b(here|current (?:location|position|place|spot))\b", text)
    return {
        "condition_description": find(rf"\b({CONDITION})", text),
        "condition_temperature": find(rf"\b({HEAT})", text),
        "spatial_relation": find(rf"\b({NEAR})", text),
        "timeRange": find(rf"\b({WHEN})", text),
        "current_location": here,
        **({} if here else places(text)),
    }


def music(text: str) -> dict:
    service = find(rf"\b({SERVICE})", text)
    year = find(r"\b(\d{4}|(?:twent|thirt|fou?rt|fift|sixt|sevent|eight|ninet)ies)\b", text)
    item = find(rf"\b({MUSIC})s?\b(?<!songs)", text)
    rest = re.sub(rf"\b(?:on|from|using|with|through|off|by)? ?(?:the )?({SERVICE}|{year or '@'}'?s?\b)", "", text, flags=re.I)
    rest = re.sub(r"^.*?\b(?:play|hear|listen to|put on|start)(?: me)? ", "", rest, flags=re.I)
    sort = find(r"\b(most popular|greatest|newest|latest|last|new|best|good|popular|top(?:[ -](?:\d+|\w+ty|five|ten))?)\b", rest)
    artist = find(r"\bby (?:the )?(?:artist )?(.+?)[.?]?$", rest)
    by = re.match(r"(?!some|any|the|music|songs?)(\S.*?) (?:by|from) ", rest) if artist else None
    if by and not item and not sort:
        return {"track": by[1], "artist": artist, "year": year, "service": service}
    if artist is None:
        artist = find(r"^(.+?)[.?]?$", re.sub(rf"\b(?:some|any|the|a|an|music|songs?|{MUSIC}s?|{sort or '@'}|from|of)\b", "", rest, flags=re.I))
    return {"sort": sort, "music_item": item, "artist": artist and re.sub(r"\s+", " ", artist), "year": year, "service": service}


def rate(text: str) -> dict:
    series = find(r"\b(chronicle|series|saga)\b", text)
    select = find(rf"\b(this|current|previous|following|next|last)\b(?= (?:current )?(?:{BOOK}|chronicle|series|saga))", text)
    value = find(rf"(?<!of )\b({N})\b(?! ?{BOOK})(?= (?:out|of|star|point|to)|[.?]?$| for)", text) or find(rf"\b({N})\b", text)
    name = None
    if not select:
        name = find(rf"\b(?:rate|rating|give)(?: the (?:{BOOK}|{series or '@'})| {BOOK}| {series or '@'})? (.+?),? (?:as |with |at )?(?:an? (?:rating|value|score) (?:of )?|an? )?{N}\b", text)
        name = name or find(r"(?:to|for|of) (?:the )?(?:book |novel |essay )?([A-Z].+?)[.?]?$", text, 0)
    return {
        "object_name": name, "object_select": select, "object_type": find(rf"\b({BOOK})\b", text) if select else None,
        "object_part_of_series_type": series, "rating_value": value, "rating_unit": find(r"\b(stars|points)\b", text),
        "best_rating": "6" if re.search(r"\bof (?:a possible )?6|to 6|best.* 6", text) and value != "6" else None,
    }  # fmt: skip


def work(text: str) -> dict:
    kind = find(rf"\b({WORK})\b", re.sub(r"^(?:show|picture|book)\b", "", text, flags=re.I))
    rest = re.sub(r"^.*?\b(?:find|search for|search|look(?:ing)? (?:up|for)|show|get|give|fine|play|see|watch|view|hear|buy|purchase|called|titled)\b(?: me| us)? ?", "", text, flags=re.I)
    rest = re.sub(rf"^(?:the |an? )?(?:{kind or '@'})\b,? ?(?:called |titled |named |of |for )?|,? ?(?:the |an? )?\b(?:{kind or '@'})[.?]?$", "", rest, flags=re.I)
    rest = re.sub(r"^.*\b(?:called|titled|named) ", "", rest)
    return {"object_type": kind, "object_name": find(r"^(?:the (?=[a-z])|for )?(.+?)[.?]?$" if kind else r"^(.+?)[.?]?$", rest, 0)}


def screening(text: str) -> dict:
    name = find(rf"\b(?:showing|[Ss]ee|[Ww]atch|playing|for|[Ii]s|will) ((?!the (?:near|clos|movie)|at|in|films|movies|animated|it)[A-Z].+?)(?: (?:at (?:the|[A-Z\d])|in the|playing|showing|be|start)\b| {WHEN}|[.?]?$)", text, 0)
    return {
        "object_type": find(r"\b(movie (?:schedules?|times)|schedules?)\b", text), "movie_name": name,
        "movie_type": None if name else find(r"\b(animated movies?|movies|films?)\b", text),
        "spatial_relation": find(rf"\b({NEAR})", text), "object_location_type": find(rf"\b({CINEMA})\b", text),
        "location_name": find(r"\bat (?:the )?((?!closest|nearest|cinema|movie)[\w& -]+? (?:theat(?:re|er)s?|cinemas?|corporation|entertainment|movies|megaplexes))", text),
        "timeRange": find(rf"\b({WHEN})", text),
    }  # fmt: skip


SLOT_RULES = {
    "AddToPlaylist": playlist, "BookRestaurant": restaurant, "GetWeather": weather, "PlayMusic": music, "RateBook": rate,
    "SearchCreativeWork": work, "SearchScreeningEvent": screening,
}  # fmt: skip
