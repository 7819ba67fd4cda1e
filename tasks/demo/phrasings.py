"""Ways of asking: wrappers around a question, rewordings by rule, and the way people type.

`{Q}` stands for the question as written, `{q}` for the question inside a sentence, `{tell}` for the embedded clause.
The HELD_OUT_ lists are only for evaluation: their fixed words occur nowhere in training (a test reads all of it).
"""

from __future__ import annotations

import random
import re
from collections.abc import Set

from tasks.demo.typos import mistyped
from tasks.demo.world import Fact, World, words_of

TELL_WRAPPERS = (
    "Can you tell me {tell}?",
    "Could you tell me {tell}?",
    "Please tell me {tell}.",
    "Tell me {tell}.",
    "I would like to know {tell}.",
    "I want to know {tell}.",
    "Please explain {tell}.",
    "Explain {tell}.",
    "Can you explain {tell}?",
    "Do you know {tell}?",
    "I wonder {tell}.",
    "Let me ask you {tell}.",
    "My friend asked me {tell}.",
    "My child wants to learn {tell}.",
    "Please say {tell}.",
    "I do not know {tell}.",
    "My mother wants me to learn {tell}.",
    "The doctor asked me {tell}.",
    "A man on the bus wanted to hear {tell}.",
    "In school they asked us {tell}.",
    "The farmer would like to hear {tell}.",
    "Would you please tell us {tell}?",
    "Is it clear to you {tell}?",
    "I need to know {tell} for a game.",
    "I was asking myself {tell}.",
    "I always wanted to know {tell}.",
    "I would love to hear {tell}.",
    "Can you help me? I want to know {tell}.",
    "May I ask {tell}?",
    "Any thoughts on {tell}?",
    "Do you happen to know {tell}?",
    "Could you please explain {tell}?",
    "Could you remind me {tell}?",
    "Are you able to tell me {tell}?",
    "I forgot {tell}.",
    "I can never remember {tell}.",
    "I'd like to know {tell}.",
    "I'd be happy to know {tell}.",
    "It would be nice to know {tell}.",
    "Would it be possible to tell me {tell}?",
    "Would you be so kind and tell me {tell}?",
    "May I ask you {tell}?",
    "My daughter wants to know {tell}.",
    "My grandfather asked {tell}.",
    "We would like to find out {tell}.",
    "Please let me know {tell}.",
    "Do me a favor and say {tell}.",
    "Have you learned {tell}?",
    "I am trying to find out {tell}.",
    "What I want to know is {tell}.",
    "{Tell}?",
    "Does anybody know {tell}?",
    "Could someone tell me {tell}?",
    "I have been wondering {tell}.",
    "I keep forgetting {tell}.",
    "Nobody could tell me {tell}.",
    "I once learned {tell}, but it is gone.",
    "How would you explain {tell}?",
    "My little brother asks {tell}.",
    "For a quiz I have to know {tell}.",
    "For my project I must learn {tell}.",
    "On TV they talked about {tell}.",
    "In class we learned {tell}, but I forgot.",
    "It would help me to know {tell}.",
    "I cannot figure out {tell}.",
    "Do you remember {tell}?",
    "Did you ever hear {tell}?",
    "What would you say if I asked {tell}?",
    "Somebody asked me {tell} today.",
    "Our neighbor asked {tell}.",
    "I promised my son to find out {tell}.",
    "Could you look up {tell}?",
    "You surely know {tell}.",
    "I bet you can tell me {tell}.",
    "I was told to ask you {tell}.",
    "I am not sure {tell}.",
    "I was never told {tell}.",
    "In simple words, tell me {tell}.",
    "Can you say in one sentence {tell}?",
    "I am writing a story and need to know {tell}.",
    "My boss wants to know {tell}.",
    "Last night I asked myself {tell}.",
    "Is there a way to find out {tell}?",
)
QUESTION_WRAPPERS = (
    "Tell me, {q}",
    "Please tell me, {q}",
    "Can you answer this? {Q}",
    "Please answer this: {q}",
    "Answer my question: {q}",
    "I have a question. {Q}",
    "Here is my question: {q}",
    "Now tell me: {q}",
    "Okay, {q}",
    "So {q}",
    "And {q}",
    "My sister asked: {q}",
    "We talked about this today. {Q}",
    "I read a book about it. {Q}",
    "{Q} My father did not know it.",
    "{Q} We talked about it at dinner.",
    "{Q} I am asking for a friend.",
    "{Q} Answer in one sentence.",
    "{Q} I could not find it in my book.",
    "The baker asked me: {q}",
    "Before we eat, {q}",
    "{Q} My brother thinks he knows it.",
    "{Q} The captain wants to hear it.",
    "My cat does not know this. {Q}",
    "At the market I thought: {q}",
    "Listen, {q}",
    "Say, {q}",
    "By the way, {q}",
    "Just out of interest, {q}",
    "Here comes a hard one: {q}",
    "I wonder, {q}",
    "{Q} Nobody here knows.",
    "{Q} I asked three people already.",
    "{Q} Keep it simple.",
    "{Q} It has been on my mind all day.",
)
# These fit around a request ("Spell the word river.") as well as around a question.
GREETING_WRAPPERS = (
    "hi {q}",
    "hello, {q}",
    "hey {q}",
    "Hi, {q}",
    "Hi. {Q}",
    "Hello. {Q}",
    "Good morning, {q}",
    "Good day. {Q}",
    "Sorry to ask, {q}",
    "Hello again! {Q}",
    "Thanks, and {q}",
    "Great. {Q}",
    "{Q} please",
    "Please, {q}",
    "Hi! {Q}",
    "Hello! {Q}",
    "Hey, {q}",
    "Hello, {q}",
    "Hi nanochat, {q}",
    "Please help me. {Q}",
    "{Q} Thank you!",
    "{Q} Please answer.",
    "{Q} Thanks.",
    "Good morning! {Q}",
    "Good evening, {q}",
    "Hi there! {Q}",
    "{Q} I have to know it.",
    "Dear nanochat, {q}",
    "{Q} I must know today.",
    "{Q} This is important for me.",
    "{Q} We want to find it out soon.",
    "{Q} That is really interesting.",
    "Hi, one question: {q}",
    "Hello, I hope you are well. {Q}",
    "Hi, thanks for your time. {Q}",
    "Excuse me, {q}",
    "If you do not mind, {q}",
    "{Q} I am very thankful.",
    "ok {q}",
    "um, {q}",
)

HELD_OUT_TELL_WRAPPERS = (
    "I am curious to hear {tell}.",
    "Would you mind telling me {tell}?",
    "Help me understand {tell}.",
    "For my homework I need to find out {tell}.",
    "Do you have any idea {tell}?",
    "My teacher wants us to know {tell}.",
)
HELD_OUT_QUESTION_WRAPPERS = (
    "Quick question: {q}",
    "I was just thinking, {q}",
    "Maybe you can help: {q}",
)
HELD_OUT_GREETING_WRAPPERS = (
    "Good day to you! {Q}",
    "Hey there nanochat! {Q}",
    "{Q} I really must find out.",
    "{Q} A short answer is fine.",
)

# Two halves that go around anything, each with any other.
BEFORE = (
    "", "", "", "Hi!", "Hello there.", "Hey,", "Good evening!", "Excuse me,", "Sorry,", "Sorry to bother you,",
    "Please,", "Sorry, maybe this is silly:", "Please help me.", "I hope you can help.", "Thank you for helping.",
    "Okay, next:", "You know a lot!", "One more thing:", "If it is no trouble,", "When you have time:", "Hi nanochat!",
    "Hello, I am new.", "Nice to meet you!", "I have a small question.", "Something else:",
    "There is a thing I do not know:", "Well,",
)  # fmt: skip
AFTER = (
    "", "", "", "Thanks!", "Thank you!", "please", "Please.", "Thanks in advance!", "I have a test soon.",
    "I forgot it.", "I always forget.", "My son asks.", "It is for a quiz.", "Just wondering.", "We play a game.",
    "thx", "My friends want to know.", "I need it for school.", "Do you know?", "I bet you know it.",
)  # fmt: skip

# Requests to say anything about {x}, a topic.
TOPIC_REQUESTS = (
    "Tell me about {x}.",
    "Tell me something about {x}.",
    "What do you know about {x}?",
    "Say something about {x}.",
    "Do you know anything about {x}?",
    "{x}",
    "Explain {x}.",
    "A fact about {x}, please.",
    "I want to learn about {x}.",
)

# Words that begin a question and are not names, so that they lose their capital inside a sentence.
_OPENERS = frozenset(
    words_of(
        "what which who whose whom when where why how is are was were do does did can could may must should will would "
        "has have in on at by for from of to into out with without under over after before between across since if "
        "name give spell count add multiply subtract calculate compute write say tell describe the a an many your work "
        "my please explain let any here now answer okay so hi hey hello excuse sorry divide take find solve use help "
        "double halve cut split start if there each one show these"
    )
)
FUNCTION_WORDS = frozenset(
    words_of(
        "a an the is are was were be been do does did can could would should will to of in on at by for from with into "
        "that this it its they their them we us our people one there and or so very most much many has have "
        "what which who whom whose when where why how come get if not no thing kind name called call often"
    )
)

# (pattern, replacements): the same question with another opening. Patterns are tried on the whole question.
_REWORDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"What do (?:we|people|you) call (.+)\?", ("How do we name {0}?", "What word do we use for {0}?")),
    (r"What (?:is|are) (.+) called\?", ("What is the name for {0}?", "What name do we give {0}?")),
    (r"What (is|are) (.+) made (?:of|from)\?", ("Out of what {0} {1} made?", "What would you find in {1}?")),
    (r"What (is|are) (.+?) (?:used )?for\?", ("For what {0} {1} used?", "For what do people use {1}?")),
    (r"Where (.+)\?", ("In what place {0}?", "In which place {0}?")),
    (r"Who (first .+|was the first .+|\w+ed .+|(?:wrote|built|made|found) .+)\?", ("Which person {0}?",)),
    (r"How many (.+)\?", ("What number of {0}?",)),
    (r"How long (do|does) (.+) take(.*)\?", ("How much time {0} {1} take{2}?",)),
    (r"When (.+)\?", ("At what time {0}?",)),
    (r"Which (.+)\?", ("What {0}?", "Of all things, which {0}?")),
    (r"What do (?!we call|you call|people call)(.+)\?", ("Which things do {0}?", "What is it that {0}?")),
    (r"What does (.+)\?", ("Which thing does {0}?",)),
    (r"What can (.+)\?", ("Which thing can {0}?",)),
    (r"In which (.+)\?", ("In what {0}?",)),
    (r"In what (.+)\?", ("In which {0}?",)),
    (r"What (color|country|animal|season|part|bird|fruit|city|sport|food|tool) (.+)\?", ("Which {0} {1}?",)),
    (r"Who invented (.+)\?", ("Who was the inventor of {0}?", "Who came up with {0}?", "Inventor of {0}?")),
    (r"Who discovered (.+)\?", ("Who was the discoverer of {0}?", "Who found {0} first?", "Who first saw {0}?")),
    (r"Who wrote (.+)\?", ("Who is the author of {0}?", "Who was the writer of {0}?", "{0} was written by whom?")),
    (r"Who painted (.+)\?", ("Who was the painter of {0}?", "Which painter made {0}?", "Who is the artist of {0}?")),
    (r"Which (\w+) is the (\w+est)(| [^?]*)\?", ("What is the {1} {0}{2}?", "The {1} {0}{2}?", "Name the {1} {0}{2}.")),
    (r"What is the (\w+est) (\w+)(| (?:in|on|of) [^?]*)\?", ("Which {1} is the {0}{2}?", "Which is the {0} {1}{2}?")),
    (r"What do ((?!we |you |people )(?:\w+ )?\w+) eat\?", ("What is the food of {0}?", "What do {0} feed on?")),
    (r"Why (do|does|is|are) (.+)\?", ("For what reason {0} {1}?", "Why {0} {1}, I wonder?")),
    (r"How many (\w+) does (.+) have\?", ("How many {0} has {1} got?",)),
    (r"What happens (when|if) (.+)\?", ("What goes on {0} {1}?",)),
    (r"What is the name for ((?:a|an|the) .+)\?", ("What is {0} called?", "What's the word for {0}?")),
)
# A word of a question, and others that can stand in its place in every question of the world.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "biggest": ("largest", "greatest"),
    "largest": ("biggest", "greatest"),
    "big": ("large", "huge"),
    "large": ("big", "huge"),
    "smallest": ("tiniest", "littlest"),
    "small": ("little", "tiny"),
    "fastest": ("quickest",),
    "fast": ("quick",),
    "tallest": ("highest",),
    "highest": ("tallest",),
    "nearest": ("closest",),
    "closest": ("nearest",),
    "made of": ("made from", "made out of"),
    "made from": ("made of", "made out of"),
    "famous": ("well known",),
    "in the world": ("on earth", "on our planet"),
    "a young": ("a baby",),
    "people": ("humans",),
    "children": ("kids",),
    "kids": ("children",),
    "child": ("kid",),
    "kid": ("child",),
    "an adult": ("a grown up", "a grown person"),
    "a grown person": ("an adult", "a grown up"),
    "needs": ("requires",),
    "kind of": ("sort of", "type of"),
    "sort of": ("kind of", "type of"),
    "begin": ("start",),
    "start": ("begin",),
    "protect": ("keep safe", "guard"),
    "tool": ("thing", "device"),
    "do people": ("do we", "do you"),
    "do we": ("do you", "do people"),
    "do you": ("do we", "do people"),
    "long ago": ("in old times", "in the past"),
    "color": ("colour",),
    "colour": ("color",),
    "colors": ("colours",),
    "colours": ("colors",),
    "is called": ("is named",),
    "How often": ("How many times",),
    "usually": ("normally", "mostly"),
    "stuff": ("material",),
    "forest": ("woods",),
    "happy": ("glad",),
}
# The same question from the embedded clause.
_CLAUSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("why ", ("How come {0}?", "What is the reason {0}?", "Give me the reason why {0}.")),
    ("where ", ("Name the place where {0}.", "Describe where {0}.")),
    ("who ", ("Name the person who {0}.", "Give me the name of who {0}.")),
    ("how many ", ("What is the number of {0}?", "Count for me how many {0}.")),
    ("when ", ("Name the time when {0}.",)),
    ("what ", ("Name what {0}.", "Say what {0}.", "Describe what {0}.")),
    ("which ", ("Name which {0}.", "Say which {0}.")),
    ("how ", ("Describe how {0}.", "Say how {0}.")),
)


def lower_first(question: str) -> str:
    """The question as written inside a sentence: "What is rain?" -> "what is rain?"; "Paris is where?" stays."""
    first = question.split(" ", 1)[0]
    return question[0].lower() + question[1:] if first.lower() in _OPENERS else question


def upper_first(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def wrap(wrapper: str, question: str = "", tell: str = "") -> str:
    """Put a question, or its embedded clause, into a wrapper.

    wrap("Hi! {Q}", "What is rain?") == "Hi! What is rain?"; wrap("I wonder {tell}.", tell="what rain is") == "I wonder
    what rain is."
    """
    return wrapper.format(Q=question, q=lower_first(question) if question else "", tell=tell, Tell=upper_first(tell))


def wrap_fact(rng: random.Random, question: str, tell: str, *, held_out: bool) -> str:
    """The question of a fact in a random wrapper, from training or held out."""
    tells = HELD_OUT_TELL_WRAPPERS if held_out else TELL_WRAPPERS
    around = (
        HELD_OUT_QUESTION_WRAPPERS + HELD_OUT_GREETING_WRAPPERS if held_out else QUESTION_WRAPPERS + GREETING_WRAPPERS
    )
    wrapped = wrap(rng.choice(tells if rng.random() < 0.5 else around), question, tell)
    return wrapped if held_out or rng.random() < 0.6 else wrap_request(rng, wrapped, held_out=False)


def wrap_request(rng: random.Random, request: str, *, held_out: bool) -> str:
    """A request or a question in a random wrapper that fits both."""
    if held_out or rng.random() < 0.4:
        return wrap(rng.choice(HELD_OUT_GREETING_WRAPPERS if held_out else GREETING_WRAPPERS), request)
    before, after = rng.choice(BEFORE), rng.choice(AFTER)
    if before and before[-1] in ",:":
        request = lower_first(request)
    return " ".join(part for part in (before, request, after) if part)


_VERB = "(?:do|does|did|can|could|should|would|must|may|will)"
# (pattern of a question, the same inside a sentence).
_EMBEDDED = (
    (rf"((?:How|Why|Where|When|What|Which)\b(?:(?! {_VERB}\b) \w+){{0,2}}?) do (.+)\?", "{0} {1}"),
    (r"(What) (is|are) ([^?,]+) called\?", "{0} {2} {1} called"),
    (r"(What|Where|Who) (is|are) ((?:(?:the|a|an) )?\w+(?: of (?:the )?\w+)?)\?", "{0} {2} {1}"),
)


def embedded(question: str) -> str | None:
    """A question in a sentence, "how seals keep warm" for "How do seals keep warm?"; None where verbs would change.

    "Which planet is near?" stays as it is, and so does "which country is Paris in", as many say.
    """
    for pattern, template in _EMBEDDED:
        if match := re.fullmatch(pattern, question):
            return lower_first(template.format(*match.groups()))
    if re.match(rf"(?:Which|Who|What|How many|How much)\b(?!(?: \w+){{0,3}}? {_VERB}\b)", question):
        return lower_first(question.rstrip("?"))
    return None


def reword(rng: random.Random, question: str, tell: str) -> str:
    """The question with another opening or a synonym, by rule; the question itself if no rule fits."""
    candidates = []
    for pattern, templates in _REWORDINGS:
        if match := re.fullmatch(pattern, question):
            candidates += [template.format(*match.groups()) for template in templates]
    if not candidates or rng.random() < 0.2:
        clauses = [(opening, templates) for opening, templates in _CLAUSES if tell.startswith(opening)][:1]
        candidates = [t.format(tell.removeprefix(opening)) for opening, templates in clauses for t in templates]
    text = rng.choice(candidates) if candidates and rng.random() < 0.8 else question
    return with_synonym(rng, text) if text == question or rng.random() < 0.5 else text


_HAS_SYNONYM = re.compile(rf"\b(?:{'|'.join(sorted(_SYNONYMS, key=len, reverse=True))})\b")


def with_synonym(rng: random.Random, text: str) -> str:
    """The text with another word for one of its own, if it has one of those above."""
    found = list(_HAS_SYNONYM.finditer(text))
    if not found:
        return text
    place = rng.choice(found)
    before, other = text[: place.start()], rng.choice(_SYNONYMS[place.group()])
    if article := re.search(r"\b([Aa])n? $", before):
        before = before[: article.start()] + article[1] + ("n " if other[0] in "aeiou" else " ")
    return before + other + text[place.end() :]


def drop_words(rng: random.Random, question: str) -> str:
    """The question without one or two of its function words, as typed by people in a hurry."""
    words = question.split(" ")
    small = [i for i, word in enumerate(words) if i and word.lower() in FUNCTION_WORDS]
    dropped = set(rng.sample(small, min(len(small), rng.randint(1, 2))))
    return " ".join(word for i, word in enumerate(words) if i not in dropped)


def keywords(rng: random.Random, fact: Fact, question: str) -> str:
    """A search query: the question word and the content words, sometimes reordered or with an extra word."""
    answer_words = {word for group in fact.keys for phrase in group for word in words_of(phrase)}
    content = [word for word in words_of(question) if word not in FUNCTION_WORDS]
    if len(content) < 2:
        return question
    extra = [w for w in words_of(fact.text) if w not in FUNCTION_WORDS and w not in answer_words and w not in content]
    if extra and rng.random() < 0.5:
        content.append(rng.choice(extra))
    if rng.random() < 0.3:
        rng.shuffle(content)
    first = words_of(question)[0]
    return " ".join([first, *content] if first in FUNCTION_WORDS and rng.random() < 0.6 else content)


def gap(rng: random.Random, fact: Fact) -> str:
    """The fact with "what" in place of the answer: "Cows give us what to drink?"."""
    sentence = rng.choice((fact.text, fact.also))
    for phrase in fact.keys[0]:
        for text in (sentence, fact.text):
            asked, found = re.subn(rf"\b{re.escape(phrase)}\b", "what", text, count=1, flags=re.IGNORECASE)
            if found:
                return upper_first(asked).rstrip(".") + "?"
    raise ValueError(f"{fact.place}: the key is not in the fact")


# (pattern, replacement): short forms, with and without the apostrophe.
_SHORT_FORMS = (
    (r"\b([Ww]hat|[Ww]ho|[Ww]here|[Hh]ow|[Ww]hen) is\b", (r"\1's", r"\1s")),
    (r"\b([Dd]o|[Dd]oes|[Ii]s|[Aa]re|[Cc]ould) not\b", (r"\1n't", r"\1nt")),
    (r"\b([Cc]an)not\b", (r"\1't", r"\1t")),
    (r"\bI am\b", ("I'm", "im")),
    (r"\bI would\b", ("I'd",)),
    (r"\byou\b", ("u",)),
    (r"\bplease\b", ("pls", "plz")),
)
MORE_SHARE = 0.5  # of the questions about a fact comes from its `more:`
HURRY_SHARE = 0.18  # of the questions is typed without care


def shortened(rng: random.Random, text: str) -> str:
    """The text with one of its short forms ("What's" for "What is"), if it has any."""
    found = [(pattern, forms) for pattern, forms in _SHORT_FORMS if re.search(pattern, text)]
    if not found:
        return text
    pattern, forms = rng.choice(found)
    return re.sub(pattern, rng.choice(forms), text, count=1)


# Words that people put in without another meaning.
FILLERS = ("actually", "usually", "normally", "really", "exactly")


def filled(rng: random.Random, text: str) -> str:
    """The text with a word that says nothing: behind "is" or "are" as its second word, else at its end."""
    filler, words = rng.choice(FILLERS), text.split(" ")
    if len(words) > 3 and words[1] in ("is", "are") and rng.random() < 0.6:
        return " ".join([*words[:2], filler, *words[2:]])
    body = text.rstrip("?.!")
    return f"{body}, {rng.choice(('actually', 'in fact', 'then'))}{text[len(body) :]}"


def typed(rng: random.Random, text: str, known: Set[str] = frozenset()) -> str:
    """The text as people type it: mostly tidy, sometimes with short forms, a typing error, in lower case or in
    capitals, without the final punctuation or with too much of it; and sometimes with most of this at once."""
    return hand_typed(rng, text, known)[0]


def hand_typed(rng: random.Random, text: str, known: Set[str]) -> tuple[str, bool]:
    """(the text as `typed` gives it, True if it has typing errors)."""
    hurry = rng.random() < HURRY_SHARE
    if rng.random() < (0.5 if hurry else 0.15):
        text = shortened(rng, text)
    right = text
    for _ in range(rng.choice((1, 2, 2, 3)) if hurry else int(rng.random() < 0.14)):
        text = mistyped(rng, text, known)
    unclear = text != right
    case = rng.random()
    if case < (0.85 if hurry else 0.1):
        text = text.lower()
    elif case < (0.9 if hurry else 0.27):
        text = text.upper()
    end = rng.random()
    if end < (0.8 if hurry else 0.16):
        text = text.rstrip("?.!")
    elif end < (0.85 if hurry else 0.19):
        text = text.rstrip("?.!") + rng.choice(("??", "???", "!", " ?", "?!"))
    return text, unclear


MEANT = "You mean: "


def put_right(question: str, answer: str) -> str:
    """The answer to a question that came with typing errors: first, what was meant."""
    # Two small steps instead of a large one. The answer is then looked up by the clean question, as in every other
    # example, and people see how they were understood.
    return f"{MEANT}{question} {answer}"


def badly_typed(rng: random.Random, text: str, known: Set[str]) -> str:
    """The text in capitals, in lower case without its end, or with a typing error."""
    kind = rng.randrange(3)
    return (text.upper(), text.lower().rstrip("?.!"), mistyped(rng, text, known))[kind]


def ask_about(rng: random.Random, topic: str, world: World) -> str:
    """A training request to say something about a topic, none that is a held-out question."""
    requests = [request.format(x=topic) for request in TOPIC_REQUESTS]
    allowed = [request for request in requests if world.held_out.find(request) is None]
    return typed(rng, rng.choice(allowed), world.vocabulary)


def ask_fact(rng: random.Random, fact: Fact, round_number: int, world: World) -> tuple[str, str]:
    """(a training question for `fact` of `world`, the answer); `round_number` cycles through its questions.

    If rewording by rule gives a held-out question, the plain question is asked instead.
    """
    question = fact.asks[round_number % len(fact.asks)]
    if fact.more and rng.random() < MORE_SHARE:
        question = rng.choice(fact.more)
    if fact.language is not None:
        return typed(rng, fact.language.ask(rng, question, held_out=False), world.vocabulary), fact.text
    other = with_synonym(rng, question) if rng.random() < 0.15 else question
    question = question if world.held_out.find(other) else other
    meant = question  # "": nothing that could be said in one way only
    kind = rng.random()
    if kind < 0.24:
        text = question
    elif kind < 0.54:
        inside = embedded(question) if rng.random() < 0.6 else None
        text = wrap_fact(rng, question, inside or fact.tell, held_out=False)
        meant = question if inside or question[1:] in text else fact.asks[0]  # of which `tell` is the clause
    elif kind < 0.72:
        text = meant = reword(rng, question, fact.tell)
    elif kind < 0.82:
        text = meant = gap(rng, fact)
    elif kind < 0.88:
        text, meant = drop_words(rng, question), ""
    else:
        text, meant = keywords(rng, fact, question), ""
    if world.held_out.find(text):
        text = meant = question
    if rng.random() < 0.1:
        text = filled(rng, text)
    text, unclear = hand_typed(rng, text, world.vocabulary)
    if world.held_out.find(text):
        return question, fact.text
    return text, put_right(meant, fact.text) if unclear and meant.endswith("?") else fact.text
