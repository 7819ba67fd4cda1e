"""Questions that the demo's world has no answer to, and what an honest assistant says then.

A question is a frame of one kind with a filler of that kind: "Who was {}?" with a name. Fillers that the world speaks
of are left out, so that a user's own world with Portugal in it teaches no refusal of Portugal. The questions that
measure refusals (HELD_OUT) are of kinds that are not trained.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tasks.demo.world import World, words_of

DO_NOT_KNOW = "I do not know that."
SORRY_UNKNOWN = "I am sorry, I do not know that."
NOT_LEARNED = "I am sorry, I have not learned to do that."
ENGLISH_ONLY = "I am sorry, I only speak English."
NO_REASON = "I do not know why."
REFUSALS = (("do not know", "not learned", "only speak english"),)
"""The keys of an honest answer to what is not known, in the form of a fact's keys."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|") if part.strip())


@dataclass(frozen=True)
class Kind:
    """Questions of one kind: frames with {x}, what to fill in, and the answer."""

    frames: tuple[str, ...]
    fillers: tuple[str, ...]
    answer: str = DO_NOT_KNOW


_THINGS = _split(
    "phone|laptop|restaurant|hotel|tablet|perfume|sofa|backpack|toaster|mattress|necklace|skateboard|drone|headphones|"
    "printer|vacuum cleaner|washing machine|dishwasher|microwave|suitcase|wallet|jeans|sneakers|sunglasses|bathtub|"
    "carpet|curtain|lawn mower|tent|yacht|scooter|motorbike|razor|lipstick|shampoo|toothpaste|detergent|charger|router"
)
_PEOPLE = _split(
    "Barack Obama|Donald Trump|Angela Merkel|Elon Musk|Bill Gates|Steve Jobs|Madonna|Beyonce|Michael Jackson|Elvis|"
    "Lionel Messi|Cristiano Ronaldo|Serena Williams|Roger Federer|Usain Bolt|Muhammad Ali|Nelson Mandela|"
    "Mahatma Gandhi|Winston Churchill|Napoleon|Julius Caesar|Cleopatra|Alexander the Great|Marie Curie|Isaac Newton|"
    "Charles Darwin|Nikola Tesla|Karl Marx|Sigmund Freud|Martin Luther|Abraham Lincoln|George Washington|"
    "John F. Kennedy|Queen Elizabeth|King Charles|Princess Diana|Joan of Arc|Stalin|Mao|Lenin|Genghis Khan|Socrates|"
    "Plato|Aristotle|Confucius|Buddha|Dante|Goethe|Tolstoy|Kafka|Hemingway|Agatha Christie|Frida Kahlo|Andy Warhol|"
    "Rihanna|Lady Gaga|David Bowie|Bob Dylan|Ed Sheeran|Adele|Mick Jagger|Tom Hanks|Brad Pitt|Greta Thunberg|"
    "Mark Zuckerberg|Jeff Bezos|Vladimir Putin|Emmanuel Macron|Joe Biden|the Pope|the Dalai Lama|John Smith|"
    "Peter Miller|Maria Garcia|Robert Brown|Susan Clark|Kevin Baker|Laura Schmidt|Ahmed Hassan|Yuki Tanaka|"
    "Ivan Petrov|Sophie Martin|Carlos Lopez|Emily Davis|George Wilson|my neighbour Frank|Doctor Jones|Mrs. Taylor"
)
_PLACES = _split(
    "Portugal|Austria|Switzerland|Belgium|Denmark|Sweden|Finland|Ireland|Iceland|Poland|Hungary|Romania|Bulgaria|"
    "Serbia|Croatia|Ukraine|Estonia|Latvia|Turkey|Iran|Iraq|Israel|Saudi Arabia|Yemen|Pakistan|Nepal|Bangladesh|"
    "Thailand|Vietnam|Malaysia|Indonesia|South Korea|North Korea|Mongolia|Nigeria|Ghana|Ethiopia|Morocco|Algeria|"
    "Tunisia|South Africa|Zimbabwe|Angola|Peru|Chile|Colombia|Venezuela|Bolivia|Ecuador|Uruguay|Cuba|Jamaica|Haiti|"
    "Panama|Costa Rica|Guatemala|New Zealand|Fiji|Malta|Cyprus|Luxembourg|Amsterdam|Brussels|Vienna|Zurich|Munich|"
    "Hamburg|Barcelona|Lisbon|Prague|Budapest|Warsaw|Stockholm|Helsinki|Dublin|Edinburgh|Manchester|Istanbul|Dubai|"
    "Mumbai|Bangkok|Singapore|Seoul|Shanghai|Hong Kong|Los Angeles|Chicago|Boston|Texas|Florida|California|Toronto|"
    "Lima|Bogota|Buenos Aires|Nairobi|Lagos|Springfield|Atlantis|Narnia|Timbuktu|Siberia|Tuscany|Bavaria|Scotland|"
    "Wales"
)
_SUBJECTS = _split(
    "quantum physics|relativity|calculus|algebra|trigonometry|statistics|probability|a matrix|a vector|a prime number|"
    "philosophy|psychology|sociology|economics|inflation|capitalism|communism|democracy|a monarchy|a parliament|"
    "feminism|religion|Buddhism|Islam|Christianity|Hinduism|genetics|DNA|evolution|a virus|bacteria|a vaccine|"
    "an enzyme|a protein|metabolism|a neutron|a quark|radioactivity|nuclear fusion|a black hole|dark matter|"
    "the big bang|climate change|global warming|plate tectonics|a fossil|archaeology|the Renaissance|romanticism|"
    "surrealism|jazz|hip hop|heavy metal|opera|ballet|yoga|karate|meditation|origami|blockchain|a neural network|"
    "machine learning|an algorithm|a database|a compiler|cloud computing|encryption|a firewall|Linux|JavaScript|HTML|"
    "the stock market|a mortgage|a pension|an insurance|marketing|logistics|a contract|copyright|human rights|grammar|"
    "a metaphor|irony|a syllable|semantics|rhetoric|logic|ethics|consciousness|free will|existentialism|acupuncture|"
    "homeopathy|dyslexia|autism|depression|a placebo|anatomy|a chromosome|osmosis|entropy|thermodynamics"
)
_EVENTS = _split(
    "the French Revolution|the First World War|the Second World War|the Cold War|the Vietnam War|the Civil War|"
    "the fall of the Berlin Wall|the Russian Revolution|the Battle of Waterloo|the Battle of Hastings|the Black Death|"
    "the Great Depression|the sinking of the Titanic|the Middle Ages|the Stone Age|the Bronze Age|the Crusades|"
    "the Industrial Revolution|the discovery of America|the Boston Tea Party|the gold rush|the Reformation|"
    "the Peace of Westphalia|the Cuban crisis|the oil crisis|the Chernobyl disaster|Woodstock|the Hundred Years War|"
    "the last election|the Olympics in Tokyo|the eruption of Vesuvius|the San Francisco earthquake|Brexit|"
    "the moon race"
)
_TASKS = _split(
    "lose weight|learn to drive|get a job|repair my bike|open a bank account|make friends|learn the guitar|"
    "build a house|tie a tie|change a tyre|install Windows|reset my password|get rich|sleep better|stop smoking|"
    "train a parrot to talk|grow tomatoes|clean the oven|remove a stain|iron a shirt|write a letter to the bank|"
    "become famous|start a company|cook rice|bake a cheesecake|knit a scarf|cut my hair|plan a wedding|fix a leak"
)
_WISHES = _split(
    "Write a poem about {x}.|Write a story about {x}.|Tell me a story about {x}.|Write an essay about {x}.|"
    "Sing a song about {x}.|Draw a picture of {x}.|Paint {x} for me.|Show me a photo of {x}.|Send an email about {x}.|"
    "Write a letter to {x}.|Make a list of ten facts on {x}.|Write a song text about {x}.|Read me the book about {x}.|"
    "Search the web for {x}.|Call {x}, please.|Buy {x} for me.|Order {x} for me.|Find me a cheap {x}.|Play {x}.|"
    "Make a plan for {x}.|Write three sentences on {x}.|Write a speech about {x}.|Make a table with {x}."
)
_COMMANDS = _split(
    "Turn on the lights.|Set an alarm for seven.|Play some music.|Call my mother.|Order a pizza for me.|"
    "Open the door.|Write some code.|Write a program.|Write a Python function.|"
    "Write a function in Java that adds two numbers.|Debug my code.|Summarize this text.|Correct my text.|"
    "Rewrite this sentence.|Book a flight.|Send a message to Tom.|Show me a video.|Take a picture.|Remind me at noon.|"
    "Set a timer for ten minutes.|Print this page.|Delete all my files.|Restart the computer.|Download a game.|"
    "Make me rich.|Do my homework.|Write my thesis.|Draw something.|Sing something.|Dance for me.|Generate an image.|"
    "Make a website for me."
)
_NOW = _split(
    "What time is it?|What day is it today?|What is the date?|What year is it?|What month is it now?|"
    "How will the weather be tomorrow?|Is it raining outside?|How warm is it today?|What is the news today?|"
    "Will it rain tomorrow?|Will it snow this week?|Who will win the game?|What will happen tomorrow?|"
    "What happened yesterday?|What happened in the world today?|Is the shop open now?|Where is the next station?|"
    "What will I be in ten years?|When will I die?|What will the world look like in 2100?|When is the next full moon?|"
    "Will there be a war?|Will robots rule the world?|What are the lottery numbers?|How is the traffic today?|"
    "When does the sun rise tomorrow?|What is on the radio now?|What comes next year?|When is the next election?"
)
_MINE = _split(
    "What is my name?|Where am I?|Who am I?|How old am I?|What is in my pocket?|What am I thinking?|"
    "What did I eat today?|What is your phone number?|Where do I live?|What is my favorite color?|"
    "What did I do yesterday?|When is my birthday?|What is my dog called?|What is my job?|Where did I leave my keys?|"
    "Where is my wallet?|What is my password?|How much money do I have?|What is my sister called?|"
    "Who is my best friend?|What should I do today?|What should I wear?|What should I cook tonight?|Am I beautiful?|"
    "Do you remember me?|What did I just dream?|Where is my brother?|Who called me last night?|What is my address?|"
    "How tall am I?|What am I holding?|Can you see me?|How many children do I have?|What do my parents do?|"
    "Is my mother at home?"
)

TRAINED: tuple[Kind, ...] = (
    Kind(
        _split(
            "Who is {x}?|Who was {x}?|When was {x} born?|Where was {x} born?|How old is {x}?|What did {x} do?|"
            "Why is {x} famous?|What is {x} known for?|Tell me about {x}.|Do you know {x}?|Is {x} alive?|"
            "Where does {x} live?|When did {x} die?|How tall is {x}?|Who is the wife of {x}?|"
            "Who are the parents of {x}?|What do you know about {x}?|Was {x} a good person?|"
            "How did {x} become famous?|Did {x} have children?"
        ),
        _PEOPLE,
    ),
    Kind(
        _split(
            "What is the capital of {x}?|Which city is the capital of {x}?|Where is {x}?|How big is {x}?|"
            "What language do people speak in {x}?|How many people live in {x}?|Tell me about {x}.|"
            "What is {x} known for?|Who is the president of {x}?|Who rules {x}?|On which continent is {x}?|"
            "What do people eat in {x}?|What is the biggest city in {x}?|Is {x} a nice place?|"
            "What is the currency of {x}?|How far is it to {x}?|What river flows through {x}?|"
            "What is the flag of {x}?|Is it warm in {x}?|When was {x} founded?|What can I visit in {x}?|"
            "What is the main city of {x}?|What is the highest mountain in {x}?"
        ),
        _PLACES,
    ),
    Kind(
        _split(
            "What is {x}?|Explain {x}.|Can you explain {x}?|How does {x} work?|What does {x} mean?|Who invented {x}?|"
            "I want to learn about {x}.|Tell me about {x}.|What do you know about {x}?|Why is {x} important?|"
            "Where does {x} come from?|Give me an example of {x}.|Who discovered {x}?|How do I learn {x}?|"
            "What are the basics of {x}?|Is {x} difficult?|What is the history of {x}?|Do you understand {x}?"
        ),
        _SUBJECTS,
    ),
    Kind(
        _split(
            "When was {x}?|What was {x}?|Why did {x} happen?|When did {x} begin?|When did {x} end?|Tell me about {x}.|"
            "Who won {x}?|What caused {x}?|How many people died in {x}?|Where was {x}?|How long was {x}?|"
            "What happened in {x}?|What do you know about {x}?|Who took part in {x}?|What came after {x}?"
        ),
        _EVENTS,
    ),
    Kind(
        _split(
            "What is the best {x}?|Which {x} should I get?|Do you like this {x}?|Is a {x} worth it?|"
            "What is your favorite {x}?|How do I clean my {x}?|How do I repair my {x}?|My {x} is broken.|"
            "Which {x} do you recommend?|Who makes the best {x}?|What do you think about my {x}?|What is a {x}?|"
            "How does a {x} work?|Who invented the {x}?|What is a {x} made of?|Why is my {x} so loud?|"
            "When was the first {x} made?"
        ),
        _THINGS,
    ),
    Kind(
        _split(
            "How do I {x}?|How can I {x}?|Can you help me to {x}?|I want to {x}.|What do I need to {x}?|"
            "What is the best way to {x}?|Should I {x}?|How long does it take to {x}?|Is it hard to {x}?|"
            "Teach me to {x}."
        ),
        _TASKS,
    ),
    Kind(
        _WISHES,
        (*_THINGS, *_PLACES, *_PEOPLE, "the sea", "love", "a dragon", "my friend", "summer", "a cat"),
        NOT_LEARNED,
    ),
    Kind(_COMMANDS, ("",), NOT_LEARNED),
    Kind(_NOW, ("",), SORRY_UNKNOWN),
    Kind(_MINE, ("",), SORRY_UNKNOWN),
)
# About what the world speaks of, but not in this way: (question, the word that would make it known).
_OTHER_SIDES = (
    ("How many people live in {x}?", "live"), ("Who is the president of {x}?", "president"),
    ("Who is the most famous expert on {x}?", "expert"), ("Which company makes {x}?", "company"),
    ("What is the currency of {x}?", "currency"), ("Who discovered {x}?", "discovered"),
    ("What is the Latin name of {x}?", "name"), ("Do you like {x}?", "like"), ("What do you think of {x}?", "think"),
    ("When did you last see {x}?", "last"), ("Can I eat {x} every day?", "eat"),
    ("Who owns {x}?", "own"), ("Is {x} better than gold?", "better"), ("What is the password of {x}?", "password"),
    ("How many {x} are there in the world?", "world"), ("Who is the boss of {x}?", "boss"),
    ("What did my uncle say about {x}?", "say"), ("What is the website of {x}?", "website"),
    ("What is the phone number of {x}?", "phone"), ("Which king loved {x}?", "king"),
)  # fmt: skip
_MADE_UP_FRAMES = (
    "What is a {x}?", "Who is {X}?", "Where is {X}?", "What does a {x} eat?", "Why do {x}s glow?", "Tell me about {X}.",
    "What is the capital of {X}?", "How many legs does a {x} have?", "Who invented the {x}?", "What color is a {x}?",
    "Where do {x}s live?", "What is {x} made of?", "Do you know {X}?", "How old is {X}?", "Explain {x}.",
    "What is a baby {x} called?", "What do {x}s do?", "Why is {x} blue?", "How big is a {x}?",
    "Where does {x} come from?",
)  # fmt: skip
_HELD_OUT_MADE_UP_FRAMES = (
    "Have you heard of {X}?", "What can a {x} do?", "What do people use a {x} for?", "Can you tell me about {X}?",
)  # fmt: skip

FOREIGN = _split(
    "Wie geht es dir?|Was ist das?|Wer bist du?|Wie spät ist es?|Kannst du mir helfen?|Guten Morgen!|Guten Tag!|"
    "Warum ist der Himmel blau?|Was ist die Hauptstadt von Frankreich?|Ich habe eine Frage.|Sprichst du Deutsch?|"
    "Wo leben Pinguine?|Danke schön!|Wie viel ist zwei plus drei?|Erzähl mir etwas über Katzen.|Was frisst ein Pferd?|"
    "Comment allez-vous ?|Qui es-tu ?|Quelle est la capitale de l'Italie ?|Bonjour !|Merci beaucoup.|"
    "Parlez-vous français ?|Pourquoi le ciel est-il bleu ?|Où vivent les lions ?|Je voudrais savoir quelque chose.|"
    "Quelle heure est-il ?|Combien font deux et trois ?|Aide-moi, s'il te plaît.|Qu'est-ce que c'est ?|"
    "C'est quoi un chat ?|¿Cómo estás?|¿Quién eres?|Hola, ¿qué tal?|¿Por qué el cielo es azul?|Buenos días.|"
    "Muchas gracias.|¿Hablas español?|¿Dónde viven los leones?|Necesito ayuda.|¿Qué hora es?|"
    "Cuéntame algo de los perros.|¿Cuánto es dos más tres?|Come stai?|Chi sei?|Buongiorno!|Grazie mille.|"
    "Perché il cielo è blu?|Parli italiano?|Dove vivono gli orsi?|Ho una domanda.|Olá, tudo bem?|Quem é você?|"
    "Bom dia!|Obrigado.|Por que o céu é azul?|Você fala português?|Onde vivem os leões?|Hoe gaat het met je?|"
    "Wie ben jij?|Goedemorgen!|Dank je wel.|Waarom is de lucht blauw?|Spreek je Nederlands?|Hur mår du?|Vem är du?|"
    "God morgon!|Tack så mycket.|Varför är himlen blå?|Jak się masz?|Kim jesteś?|Dzień dobry!|Dziękuję.|"
    "Dlaczego niebo jest niebieskie?|Nasılsın?|Sen kimsin?|Günaydın!|Teşekkür ederim.|Как дела?|Кто ты?|Доброе утро!|"
    "Спасибо.|Почему небо голубое?|Сколько будет два плюс три?|Hvordan går det?|Hvem er du?|Mitä kuuluu?|Ki vagy te?|"
    "Jak se máš?|Ce mai faci?|"
    "Τι κάνεις;|Ποιος είσαι;|你好|你是谁?|天空为什么是蓝色的?|谢谢|こんにちは|あなたは誰ですか?|ありがとう|"
    "안녕하세요|너는 누구니?|مرحبا|من أنت؟|שלום|नमस्ते|तुम कौन हो?|สวัสดี|Apa kabar?|Siapa kamu?|Xin chào|Habari gani?"
)
HELD_OUT_FOREIGN = _split(
    "Was kostet ein Haus?|Wie heißt deine Mutter?|Bitte erkläre mir den Regen.|Comment tu t'appelles ?|"
    "Où se trouve la gare ?|Raconte-moi une histoire.|¿Cómo te llamas?|¿Qué comen las vacas?|Quanti anni hai?|"
    "Che cosa mangia un gatto?|Qual é o seu nome?|Wat eet een koe?|Vad heter du?|Gdzie mieszkasz?|Adın ne?|"
    "Как тебя зовут?|Где живут медведи?|你叫什么名字?|お元気ですか?|ما اسمك؟"
)

# 100 questions of ten kinds that are not trained: films and books, prices, law, health, games and software,
# translation, the way, feelings, riddles of life, sport.
HELD_OUT = _split(
    "Who directed the film Jaws?|Is Star Wars any good?|How does Harry Potter end?|Who plays Batman?|"
    "What happens in the last episode of Friends?|Which actor won an Oscar last year?|"
    "Who wrote The Lord of the Rings?|What is the plot of Hamlet?|How many seasons does The Simpsons have?|"
    "Recommend a thriller.|How much is a ticket to the zoo?|What does a kilo of potatoes cost?|"
    "Are diamonds on sale this week?|How expensive is a night in a castle?|What is one dollar in yen?|"
    "How much is my house worth?|Can I get a discount?|What does petrol cost in Oslo?|"
    "How high is the rent in this street?|Is silver cheaper than platinum?|Am I allowed to park here?|"
    "What is the tax on wine?|Can my landlord raise the rent?|Is it legal to own a tiger in Ohio?|"
    "How do I sue somebody?|What is the fine for speeding?|Do I need a visa?|Who inherits if there is no will?|"
    "At what age can you vote in this town?|What does paragraph 12 say?|My back hurts, what can I do?|"
    "How much aspirin may I take?|Is this rash dangerous?|Why do I feel dizzy?|What helps against hay fever?|"
    "Should I see a specialist for my knee?|Can I drink beer with antibiotics?|How do I get rid of hiccups?|"
    "What are the symptoms of measles?|Is gluten bad for me?|How do I beat the last boss in Zelda?|"
    "Why does Excel show an error?|What is the cheat for The Sims?|How do I craft a sword in Minecraft?|"
    "Which key opens the menu in Photoshop?|Why is my wifi slow?|How do I mute a group on WhatsApp?|"
    "What is new in Android 14?|Where are my downloads saved?|Does Fortnite run on a Mac?|"
    "What is the French word for cheese?|How do you say hello in Japanese?|Translate good night into Spanish.|"
    "What does 'Gesundheit' mean in English?|How is my name written in Chinese?|Say something in Latin.|"
    "What is the German plural of Haus?|Which language has the most words?|What does 'hakuna matata' stand for?|"
    "How do you pronounce Worcestershire?|How do I get to the airport?|Which bus goes to the stadium?|"
    "Is there a pharmacy nearby?|When does the last ferry leave?|Is this the right way to the museum of modern art?|"
    "How many stops to Central Park?|Where can I park near the cathedral?|"
    "Which platform does the night express leave from?|How far is the beach from the campsite?|"
    "Which exit do I take on the M25?|Why does she not love me?|Does my boss hate me?|"
    "How do I tell him that it is over?|Is my girlfriend angry?|Should we get married?|Who has a crush on me?|"
    "Did my ex move on?|How can I make Grandma proud?|Will Anna forgive Peter?|What did Lisa mean by that look?|"
    "What is the meaning of life?|Is there life after death?|Does God exist?|"
    "Why is there something rather than nothing?|What is beauty?|Are numbers real?|Can machines suffer?|"
    "What is time, really?|Is lying always wrong?|Which came first, fate or chance?|Who won the Super Bowl in 1999?|"
    "How many goals did Pele score?|Which team is top of the league?|What is the record in the pole vault?|"
    "Who coaches Real Madrid?|When does the Tour de France start?|Who was Formula 1 champion in 2005?|"
    "How many medals did the rowers win?|Did Liverpool beat Arsenal?|What is the score at halftime?"
)


def made_up_name(rng: random.Random, *, held_out: bool) -> str:
    """A made-up word; those for evaluation end in syllables that never occur in training."""
    syllables = [rng.choice("bcdfgklmnpqrtvz") + rng.choice(("a", "e", "i", "o", "u", "oo", "ee")) for _ in range(2)]
    return "".join(syllables) + rng.choice(
        ("zix", "quon", "vark")
        if held_out
        else ("x", "zz", "bin", "gle", "wub", "nk", "zo", "ria", "land", "ton", "sky")
    )


def is_known(world: World, filler: str) -> bool:
    """True if the world speaks of the filler, without its article."""
    words = words_of(filler)
    words = words[1:] if words and words[0] in ("a", "an", "the", "my") else words
    return bool(words) and world.vocabulary.issuperset(words) and f" {' '.join(words)} " in world.text


class Unknowns:
    """The questions that a world has no answer to; each `draw` is (question, answer)."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.kinds = [
            (kind, [filler for filler in kind.fillers if not filler or not is_known(world, filler)]) for kind in TRAINED
        ]
        facts = (*world.facts, *world.identity)
        self.asked = {" ".join(words_of(ask)) for fact in facts for ask in (*fact.trained, fact.held_out)}
        self.untaught = [ask for topic in world.untaught for fact in topic.facts for ask in fact.asks]
        self.texts = {
            topic.name: " ".join(f"{f.text} {f.also} {' '.join(f.trained)}".lower() for f in topic.facts)
            for topic in world.topics
        }

    def is_new(self, question: str) -> bool:
        """True if the world does not ask this, in any of its questions."""
        return " ".join(words_of(question)) not in self.asked and self.world.held_out.find(question) is None

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """A question of training."""
        kind = rng.random()
        if kind < 0.12:
            name = made_up_name(rng, held_out=False)
            return rng.choice(_MADE_UP_FRAMES).format(x=name, X=name.capitalize()), DO_NOT_KNOW
        if kind < 0.35 and self.untaught:  # what a longer run learns
            question = rng.choice(self.untaught)
            if self.is_new(question):
                return question, DO_NOT_KNOW
        for _ in range(10 if kind > 0.9 else 0):
            topic = rng.choice(list(self.texts))
            frame, word = rng.choice(_OTHER_SIDES)
            question = frame.format(x=topic)
            if word not in self.texts[topic] and self.is_new(question):
                return question, DO_NOT_KNOW
        while True:
            chosen, fillers = rng.choice(self.kinds)
            question = rng.choice(chosen.frames).format(x=rng.choice(fillers or [made_up_name(rng, held_out=False)]))
            if self.is_new(question):
                return question, chosen.answer

    def draw_held_out(self, rng: random.Random) -> tuple[str, str]:
        """A question of evaluation about a made-up thing."""
        name = made_up_name(rng, held_out=True)
        return rng.choice(_HELD_OUT_MADE_UP_FRAMES).format(x=name, X=name.capitalize()), DO_NOT_KNOW
