"""Write data/sample: six thousand annotations by forty annotators who do not exist.

Real annotators read the same comment differently, and not at random: rough banter amuses one and
wounds the other, irony is taken at its word, a blunt question is curiosity or a slight. The sample
has just that, and nothing private in it. A small grammar writes comments in seventeen tones on
sixteen everyday topics; ten of the tones can be read in two ways, and one trait of the *reader*
decides which. So who reads matters through what they read (an interaction of text and reader),
and a table of every reader's favourite labels is not enough to predict their answers.

Since the probabilities are known, so is the best score that anybody could reach with and without
knowing who reads: it is written to best.json, as a yardstick for the models.

    python data/make_sample.py        # rewrites data/sample, byte for byte the same
"""
import csv
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from plm import split_of  # noqa: E402  (models and yardstick must agree on the test rows)

SEED = 7
TEXTS = 1500
USERS = 40
ANNOTATORS_PER_TEXT = (3, 4, 5)
TOO_SIMILAR = 0.5  # two comments may share at most this part of their words
LABELS = ["funny", "sarcastic", "hostile", "dismissive", "supportive", "curious", "sad"]

# -------------------- the readers
# Each trait is a number near +1 or near -1; the names say what +1 stands for.
TRAITS = ["thick_skin", "ear_for_irony", "trust", "light_heart"]

# tone: (the trait that decides, what a reader near +1 ticks, what a reader near -1 ticks). A weight
# of 1 is ticked by nearly everybody of that kind, a weight of 0.5 by those who tick labels readily.
# No trait: everybody reads the same.
TONES = {
    "banter": ("thick_skin", {"funny": 1, "supportive": .5}, {"hostile": 1, "dismissive": .5}),
    "curt": ("thick_skin", {"supportive": 1}, {"dismissive": 1, "hostile": .5}),
    "irony": ("ear_for_irony", {"sarcastic": 1, "funny": .5}, {"supportive": 1}),
    "lament": ("ear_for_irony", {"sarcastic": 1}, {"sad": 1}),
    "rhetorical": ("ear_for_irony", {"dismissive": 1, "sarcastic": .5}, {"curious": 1}),
    "probe": ("trust", {"curious": 1}, {"dismissive": 1, "hostile": .5}),
    "backhand": ("trust", {"supportive": 1}, {"sarcastic": 1, "dismissive": .5}),
    "rant": ("trust", {"sad": 1}, {"hostile": 1}),
    "gallows": ("light_heart", {"funny": 1}, {"sad": 1}),
    "fuss": ("light_heart", {"funny": 1}, {"hostile": 1}),
    "praise": (None, {"supportive": 1}, {}),
    "question": (None, {"curious": 1}, {}),
    "attack": (None, {"hostile": 1, "dismissive": .5}, {}),
    "loss": (None, {"sad": 1, "supportive": .5}, {}),
    "joke": (None, {"funny": 1}, {}),
    "brushoff": (None, {"dismissive": 1}, {}),
    "mockery": (None, {"sarcastic": 1, "dismissive": .5}, {}),
}
AMBIGUOUS = [tone for tone, (trait, *_) in TONES.items() if trait]
PLAIN = [tone for tone in TONES if tone not in AMBIGUOUS]
SHARE_AMBIGUOUS = 0.78
SHARE_TWO_TONES = 0.2
SECOND_TONE = 0.55  # how strong it is

# -------------------- the grammar
# {slot} is filled from the topic or from WORDS, {Slot} the same with a capital, and [this|that]
# picks one of the two. A bar outside of brackets separates whole lines.
def lines(text):
    return re.split(r"\|(?![^\[]*\])", text)  # at the bars that stand in no bracket


TOPICS = {
    "bread": dict(
        thing="sourdough loaf|rye bread|pizza dough|cinnamon bun|baguette",
        slip="burned the crust|forgot the salt|killed the starter|kneaded it for an hour|"
             "baked it upside down",
        doing="kneading by hand|feeding the starter|baking at midnight|weighing the flour",
        fix="lower the oven|let it rise overnight|buy fresh yeast|use less water",
        fact="The bakery on the corner closes at noon.|Flour is up to {n} cents a bag.|"
             "Rye needs more water than wheat."),
    "garden": dict(
        thing="tomato bed|compost heap|rose hedge|greenhouse|vegetable patch",
        slip="drowned the seedlings|planted weeds|mowed the tulips|pruned the wrong tree|"
             "left the hose running",
        doing="digging potatoes|watering the roses|chasing slugs|turning the compost",
        fix="mulch it in spring|move the pots inside|cut it back hard|water it at dawn",
        fact="The first frost came on the {n}th.|Slugs ate {n} lettuces last week.|"
             "It has not rained since April."),
    "bicycle": dict(
        thing="touring bike|rear wheel|bike lane|cargo trailer|chain guard",
        slip="bent the front wheel|lost the brake pads|rode into the pond|oiled the brakes|"
             "missed the turn twice",
        doing="climbing the pass|patching tubes|riding to work|cleaning the gears",
        fix="true the wheel|raise the saddle|grease the chain|take the flat road",
        fact="The shop charges {n} euros for a service.|There is a headwind along the river.|"
             "They painted the lane green."),
    "chess": dict(
        thing="opening move|endgame|bishop sacrifice|club tournament|chess puzzle",
        slip="hung the queen|resigned in a won position|forgot the clock|touched the wrong rook|"
             "fell for an old trap",
        doing="studying endgames|playing blitz|solving puzzles|castling early",
        fix="trade the knights|watch the clock|push the pawn|keep the king safe",
        fact="Round {n} starts after lunch.|The club meets above the library.|"
             "Black won most games this season."),
    "software": dict(
        thing="login page|weekly release|error message|search box|backup script",
        slip="deleted the database|shipped it untested|broke the build again|hid the button|"
             "renamed every file",
        doing="writing the tests|merging on Fridays|reading old logs|fixing the parser",
        fix="roll it back|restart the server|read the log file|add one more test",
        fact="Version {n} went out on Tuesday.|The server room is on the second floor.|"
             "The test run takes an hour."),
    "buses": dict(
        thing="night bus|new timetable|ticket machine|tram stop|ring line",
        slip="skipped our stop|left ten minutes early|sold me the wrong ticket|"
             "parked on the crossing|lost the spare key",
        doing="waiting in the rain|changing at the station|driving the late shift|"
              "queueing for tickets",
        fix="take the earlier one|buy a day pass|check the board|walk the last mile",
        fact="The number {n} now ends at the harbor.|The depot was sold in winter.|"
             "A monthly pass costs {n} pounds."),
    "guitar": dict(
        thing="guitar solo|second verse|borrowed amplifier|drum intro|cover version",
        slip="snapped two strings|came in a bar late|tuned it by ear|dropped the amp|"
             "forgot the chorus",
        doing="practicing scales|singing the high part|rehearsing in the garage|writing lyrics",
        fix="slow the tempo|tune it down a step|turn up the bass|count to four",
        fact="The gig is at the old cinema.|Our rehearsal room holds {n} people.|"
             "The band has had three drummers."),
    "running": dict(
        thing="half marathon|interval session|finish time|trail run|relay team",
        slip="started far too fast|tied the laces together|took the wrong trail|"
             "slept through the start|quit at the last hill",
        doing="running before dawn|stretching properly|training in the heat|counting kilometers",
        fix="rest for two days|drink more water|shorten your stride|get proper shoes",
        fact="The course has {n} bends.|Registration opens on Sunday.|"
             "It was cold along the canal."),
    "cat": dict(
        thing="tabby cat|scratching post|vet visit|litter box|kitten",
        slip="locked the cat outside|bought the wrong food|shaved half the tail|"
             "woke the whole litter|lost the carrier",
        doing="brushing the cat|sleeping on keyboards|hunting socks|begging for tuna",
        fix="open the window|try the dry food|leave a warm towel|hide the yarn",
        fact="The vet is away until the {n}th.|Our cat weighs as much as a brick.|"
             "Kittens sleep most of the day."),
    "film": dict(
        thing="final scene|sequel|plot twist|documentary|opening credits",
        slip="spoiled the ending|slept through act two|cut the best scene|filmed it out of focus|"
             "talked over the score",
        doing="watching the credits|editing all night|quoting the script|arguing about endings",
        fix="cut twenty minutes|watch it with subtitles|skip the prologue|hire an editor",
        fact="It runs {n} minutes without a break.|The cinema shows it on Thursdays.|"
             "They shot it in an empty airport."),
    "camping": dict(
        thing="tent|camp stove|hiking map|sleeping bag|campfire stew",
        slip="pitched it in a puddle|forgot the poles|fed the raccoons|burned the map|"
             "packed no socks",
        doing="hiking the ridge|sleeping on rocks|gathering wood|filtering water",
        fix="dig a little trench|pack less|hang up the food|follow the stream",
        fact="Site {n} is next to the lake.|The trail was closed for repairs.|"
             "Rangers lock the gate at sunset."),
    "knitting": dict(
        thing="wool scarf|baby blanket|sock pattern|cable sweater|crochet hat",
        slip="dropped forty stitches|knitted three sleeves|felted it in the wash|"
             "misread the chart|cut the yarn too short",
        doing="counting stitches|winding yarn|knitting on the train|blocking sweaters",
        fix="rip back one row|go up a needle size|mark every round|wash it cold",
        fact="The pattern asks for {n} rows.|The yarn shop moved across the street.|"
             "Merino is cheaper in summer."),
    "coffee": dict(
        thing="espresso machine|office coffee|milk foam|paper filter|cold brew",
        slip="flooded the kitchen|used salt for sugar|scalded the milk|reheated it twice|"
             "broke the grinder",
        doing="grinding beans|descaling the machine|brewing at six|stirring slowly",
        fix="clean the nozzle|grind it finer|warm the cups|change the filter",
        fact="The kitchen on floor {n} has no kettle.|Beans arrive from the roaster on Mondays.|"
             "The old machine went to the basement."),
    "choir": dict(
        thing="alto section|christmas concert|warm-up song|conductor|church organ",
        slip="sang the wrong page|missed the high note|lost the sheet music|clapped too soon|"
             "stood on the microphone",
        doing="holding the long note|rehearsing carols|humming the bass line|reading music",
        fix="breathe before the bar|sing it softer|watch the baton|learn it by heart",
        fact="There are {n} singers this year.|Rehearsal moved to the school gym.|"
             "The concert is in December."),
    "flat": dict(
        thing="shared kitchen|leaky tap|paint job|bookshelf|upstairs neighbor",
        slip="drilled into a pipe|painted over the switch|hung it crooked|lost the deposit|"
             "flooded the hall",
        doing="moving the sofa|sharing one bathroom|cleaning the stairs|assembling shelves",
        fix="call the landlord|turn off the water|use longer screws|measure it twice",
        fact="The rent went up by {n} dollars.|The lift has been broken since March.|"
             "Our building has two entrances."),
    "school": dict(
        thing="group project|history essay|math exam|school play|science fair",
        slip="handed in the wrong file|forgot every line|copied the index|"
             "glued the poster backwards|skipped chapter four",
        doing="marking essays|cramming at night|building volcanoes|learning dates",
        fix="ask for two more days|start with the summary|draw a diagram|read it out loud",
        fact="Room {n} smells of paint.|The exam is before the holidays.|"
             "Half the class chose geography."),
}
for slots in TOPICS.values():
    for slot in slots:
        slots[slot] = lines(slots[slot])

WORDS = {slot: lines(words) for slot, words in dict(
    goose="walnut|muppet|turnip|clown|donkey|pudding|noodle|goose|melon|pickle|hamster|teapot",
    wreck="a shipwreck|a wet sock|a crime scene|a dead pigeon|a haunted sandwich|"
          "a traffic accident|a soggy sofa|"
          "a dentist's nightmare|a collapsed circus|an angry potato",
    grand="magnificent|breathtaking|flawless|splendid|glorious|superb|majestic|exquisite",
    good="lovely|careful|thoughtful|solid|beautiful|clever|patient|warm",
    bad="useless|rotten|pathetic|disgusting|shameful|miserable|vile|worthless",
    when="yesterday|last night|this morning|on Sunday|after work|again today|over the weekend|"
         "at lunch",
    who="my sister|our neighbor|the new guy|my uncle|the trainer|a colleague|the caretaker|"
        "my old teacher|the twins",
    crowd="the whole street|the entire team|half the town|everyone at the table|all the regulars|"
          "the back row",
    animal="a blind mole|a drunk penguin|a sleepy llama|a one-legged duck|a confused otter|"
           "a retired hamster",
    prize="a medal|a parade|a statue|a brass band|a standing ovation|the key to the city|"
          "a golden spoon",
).items()}

# What a comment may begin with, whatever its tone: beside the topic's own facts, these.
CONTEXT = lines(
    "{Who} was {doing} {when}.|About the {thing} [in the photo|from the meeting|you mentioned].|"
    "[We|They] talked about {doing} {when}.|There was a {thing} [in the hall|on the list|in the "
    "newsletter].|"
    "Regarding {doing} [in general|at home|this year].|{Who} [mentioned|brought|saw] a {thing} "
    "{when}.|"
    "I read {n} posts on {doing}.|So, the {thing}.|Page {n}, on {doing}.")

# What comments of a tone say: the body, and a closing line that may follow.
SAYS = {
    "banter": (
        "Your {thing} looks like {wreck}, you [absolute|total|old|hopeless] {goose}.|"
        "[I have seen|Honestly I know] {animal} do better than you at {doing}, [mate|pal|buddy].|"
        "You {slip} {when}? [Classic you|Never change], you {goose}.|"
        "[Somebody|Please] stop this {goose} from {doing}, {crowd} [is begging|is in tears].|"
        "[Ha|Ha ha], {animal} {slip} and it [was|turned out] you, {goose}.|"
        "[Only you|Nobody but you], my {goose}, could turn a {thing} into {wreck}.|"
        "You and your {thing}, [what a pair of|two] {goose}s, [get a room|get a helmet].|"
        "[Look at|Behold] this {goose} {doing} like {animal} [on ice|in a storm|with a hangover].",
        "You owe us a round, {goose}.|Back to the zoo with you.|Bring your brain next time, pal.|"
        "We will never let you forget it.|Come here and say that, {goose}."),
    "curt": (
        "[Just|Simply] {fix} and [move on|be done with it|get on with it].|"
        "{Fix}. [Done|That is all|End of story|It is that simple].|"
        "[Stop|Quit] {doing} and {fix}, [it takes five minutes|that is the whole trick].|"
        "[Short answer|In short]: {fix}, [then|and then] forget the {thing}.|"
        "[First|Step one], {fix}. [Second|Step two], stop asking about the {thing}.|"
        "You do not need [help|advice] with {doing}, you need to {fix}.|"
        "The {thing} is [fine|not the problem], {fix} [and see|already].",
        "Next question.|Works every time.|No more to it.|The rest is noise.|Ten minutes, at most."),
    "irony": (
        "Oh [{grand}|how {grand}], they {slip} [again|once more]. {prize} for {crowd}, [please|at "
        "once].|"
        "[Wow|Bravo], you {slip} {when}, [truly|simply] {grand} [work|talent|vision].|"
        "[What a|Such a] {grand} {thing}, it only [broke|failed|collapsed] [twice|three "
        "times|every hour].|"
        "[Give|Hand] {who} {prize}: [nobody|no one] ever {slip} so "
        "[elegantly|gracefully|thoroughly].|"
        "[A {grand} idea|{Grand} planning], {doing} while {crowd} [waits|watches|starves].|"
        "[I am in awe|I am speechless], {who} {slip} and called it {grand}.|"
        "[Thank heavens|Thank goodness] for the {grand} {thing}, we [almost|nearly] had a "
        "[good|calm|normal] day.",
        "Take a bow.|A triumph for the ages.|I could not be more impressed.|Genius at work.|"
        "History will remember."),
    "lament": (
        "Another [thrilling|dazzling|wild|glamorous] evening alone with the {thing}.|"
        "[So glad|Delighted] that {crowd} went out while I was {doing} [by myself|on my own].|"
        "[Living the dream|Peak of my life]: {doing} {when}, [nobody called|no message|no "
        "visitors].|"
        "My [best friend|social life] is [now officially|these days] a {thing}, [lucky me|how "
        "exciting].|"
        "[Nothing says|Nothing screams] birthday like {doing} [in an empty room|without a single "
        "guest].|"
        "[Yes|Sure], I {slip} {when}, [but|and] who would notice, [the party is|the fun is] "
        "always elsewhere.",
        "What a life.|The wallpaper and I are very close.|Party of one, as usual.|"
        "Can hardly contain myself."),
    "rhetorical": (
        "[Who on earth|Who exactly] needs a {thing} [in this century|nowadays|at that price]?|"
        "[Since when|How] is {doing} [a hobby|a skill|an achievement|news]?|"
        "[Why would|Why should] anybody care that {who} {slip}?|"
        "[What is|Where is] the point of a {thing} if [one ends up|you are still] {doing}?|"
        "[Is|Are we saying that] {doing} [is|] [really|supposed to be] worth {n} hours?|"
        "[What sort of|What kind of] person spends {n} hours {doing}?",
        "One wonders.|Asking for the rest of us.|Does anyone know?|I keep wondering about that.|"
        "Any takers?"),
    "probe": (
        "[Did|Have] you [actually|even] try to {fix} before you {slip}?|"
        "[And how|How exactly] did you [manage to|come to] say that the {thing} [was|is] yours?|"
        "[How many times|How often] have you [really|personally] done any {doing}, [if I may "
        "ask|be honest]?|"
        "Where did you learn {doing}, [from {who}|from a leaflet]?|"
        "[You say|So you claim] you know the {thing}: did you ever {fix} [yourself|on your own]?|"
        "Which part of the {thing} did you [check|understand|build] [yourself|before posting]?|"
        "[What makes you think|Why are you sure] that you must {fix}?",
        "Please explain.|I would like details.|Take your time.|Show us your notes.|"
        "Walk me through it."),
    "backhand": (
        "[Not bad|Quite good] for someone who {slip} {when}.|"
        "[Surprisingly|Almost] {good}, [your|that] {thing}, I [expected|feared] much worse.|"
        "[You are getting better|You have improved] at {doing}, [it could only go up|the bar was "
        "low].|"
        "That {thing} is [nearly|almost] as {good} as [the one {who} made|a real one].|"
        "[For a beginner|For your age|Given your luck], {doing} went [rather|fairly] well.|"
        "[I must admit|I admit it], even you can {fix} [when you try|if told twice].|"
        "[Your best|Finest] {thing} so far, [and I have seen the others|considering the others].",
        "Keep at it, someday.|Credit where it is due.|I take back half of what I said.|"
        "Who would have thought."),
    "rant": (
        "I am [so done|completely finished] with this {thing}, [I cannot take it any more|enough "
        "is enough].|"
        "[Every|Each] single [day|week] {who} {slip}, and [I pay|I clean up|I suffer].|"
        "[Nobody|No one] listens when I say {fix}, [nobody ever has|they never do].|"
        "[I hate|I cannot stand] {doing}, I hate the {thing}, I [hate|loathe] all of it.|"
        "{n} [times|days] now I have asked {who} to {fix}, [and nothing|for nothing|no answer].|"
        "[Why always me|Always me]: {who} {slip} {when} and [I get|I carry] the blame.|"
        "They [took|ruined] my {thing}, [they took everything|they ruin everything], [every "
        "time|I am tired].",
        "I am at the end of my rope.|I want to scream.|It never stops.|Leave me out of it.|"
        "I have had it."),
    "gallows": (
        "My {thing} [died|gave up] {when}, [I am next|at least one of us is free].|"
        "[I will be|They can] [buried|bury me] beside the {thing}, we [failed|aged] together.|"
        "[Update|News from the grave]: I {slip}, my [will|funeral] is [being drafted|on Friday].|"
        "[If I vanish|When I am gone], tell {crowd} that {doing} [finished me|got me in the end].|"
        "[My doctor|My therapist] asked about {doing} and [sighed|wept|left the room].|"
        "I {slip} {when} and [felt nothing|aged {n} years], [bury me|carve it] [on my "
        "tombstone|with the {thing}].|"
        "[The {thing} and I|Me and the {thing}] are both [past repair|broken beyond hope], [one "
        "of us leaks|side by side].",
        "See you in the next life.|No flowers, please.|The end is near and it has crumbs.|"
        "Hope died first."),
    "fuss": (
        "[I demand|I insist on] a public inquiry: {who} [touched|moved] my {thing} {when}!|"
        "[Outrage|Scandal]! {Who} {slip}, and [the police|the president|the army] must [be "
        "told|act]!|"
        "[Whoever|The villain who] {slip} will [face justice|answer to me|be banned for {n} "
        "years]!|"
        "[Let it be known|Hear me, all]: {doing} without my [permission|signature] means war!|"
        "[This {thing}|That {thing}] is a [declaration of war|national disgrace], and I "
        "[shall|will] not rest!|"
        "[Down with|Death to] the {thing}, and down with {crowd} that [tolerates|applauds] it!",
        "My lawyers are awake!|This means war!|I have written to the mayor!|"
        "I am slamming the door as I type!"),
    "praise": (
        "[Thank you|Many thanks] for the {good} {thing}, it [helped me|made my week].|"
        "[You did it|Well done], all that {doing} [paid off|shows], I am [proud of|happy for] you.|"
        "{Who} said your {thing} is {good}, and [I agree|so do we all].|"
        "[Do not worry|It is all right] that you {slip}, [we are here for you|you have got this].|"
        "[Such|What] {good} work on the {thing}, [keep going|we believe in you].",
        "We are with you.|Hugs from all of us.|You can count on me.|So glad you are here."),
    "question": (
        "[Does anyone|Can somebody] [know|tell me] how to {fix} [safely|properly]?|"
        "I am [new to|learning about] {doing}, [where do I start|which book helps]?|"
        "[How does|I wonder how] a {thing} [work|works inside|get made], [I would love to "
        "learn|tell me more].|"
        "[Has anybody|Have others] compared {doing} with {doing}? [I am all ears|I am interested].|"
        "[What is the difference between|Which is older,] a {thing} and a {thing}?",
        "I would love to hear more.|Thanks in advance.|I am taking notes.|Happy to read links."),
    "attack": (
        "You [are a|] {bad} [liar|fraud|thief], [get lost|get out] before I [report you|find you].|"
        "[Shut up|Shut your mouth] about the {thing}, you {bad} [fool|coward|creep].|"
        "[People like you|Your kind] {slip} and [deserve|should get] [nothing|what is coming].|"
        "[One more word|Say it again] about {doing} and you will [regret it|be sorry].|"
        "Your {bad} {thing} [makes me sick|belongs in a fire], and so do you.",
        "I know where you park.|You have been warned.|Nobody wants you here.|Get lost for good."),
    "loss": (
        "{Who} [passed away|died] {when}, and the {thing} [is all that remains|stands there "
        "untouched].|"
        "[I miss|We all miss] {who}, {doing} [is not the same|hurts] without [that smile|that "
        "voice].|"
        "[After {n} years|In the end] we had to [sell|give up] the {thing}, [I cried|we wept] all "
        "night.|"
        "[The hospital|The clinic] called {when}, {who} will [not come home|never go {doing} "
        "again].|"
        "[It breaks my heart|My heart is heavy]: no more {doing} with {who}.",
        "Rest in peace.|The house is so quiet.|I still set two plates.|Grief comes in waves."),
    "joke": (
        "[Why did|Do you know why] the {thing} cross the road? [To get away from|It heard about] "
        "{animal}!|"
        "[A {thing} walks|{Animal} walks] into a bar, [the barman says|and orders] [no {doing} "
        "here|{n} straws]!|"
        "[My {thing}|{Who}] is [so slow|so old] that {animal} [overtook it|asked for its "
        "autograph], lol.|"
        "[Giggling|Laughing out loud], {animal} was {doing} [in pajamas|to disco music] {when}.|"
        "[Knock knock|Breaking news]: {animal} wins {prize} for {doing}, [film|circus] to follow!",
        "I will see myself out, ha.|Best giggle in weeks.|Tears of laughter here.|"
        "Lol, every time."),
    "brushoff": (
        "[Whatever|Who cares], a {thing} is a {thing}, [not worth a thread|boring].|"
        "[Not interested|No thanks], {doing} is [a waste of time|for children], [bye|scrolling "
        "on].|"
        "[Nobody asked|No one asked] about your {thing}, [moving along|irrelevant].|"
        "[Meh|Yawn], {who} {slip}, [so what|big deal].|"
        "[I stopped reading at|You lost me at] {doing}, [too long|pointless].",
        "Not my problem.|Muting this.|Irrelevant.|Come back with something real."),
    "mockery": (
        "[Yeah right|Sure, sure], and {animal} will {fix}, [totally|any minute now].|"
        "[Of course|Obviously] the {thing} is [{grand}|{good}], and I am [the queen|a unicorn|the "
        "pope].|"
        "[Mister|Professor] {doing} [has spoken|knows best], [as always|as usual], slow clap.|"
        "[Because|Yeah because] {doing} has worked so well for {who}, [right|sure].|"
        "[Oh please|Oh sure], tell us [more|again] how {who} {slip} on purpose, [rolling my "
        "eyes|pull the other one].",
        "Slow clap.|Pull the other one.|Yeah, and pigs fly.|As if."),
}
for tone, (says, closing) in SAYS.items():
    SAYS[tone] = lines(says), lines(closing)


def fill(line, topic, rng):
    """One line of the grammar -> English: brackets first, then the slots that are left."""
    def slot(match):
        name = match[1].lower()
        if name == "n":
            return str(rng.randint(10, 99))
        word = rng.choice(TOPICS[topic].get(name) or WORDS[name])
        return word[0].upper() + word[1:] if match[1][0].isupper() else word

    line = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), line)
    line = re.sub(r"\{(\w+)\}", slot, line)
    line = re.sub(r" +", " ", line)
    line = re.sub(r"\b([Aa]) (?=[aei]|o(?!ne)|ups)", r"\1n ", line)  # an upstairs neighbor
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), line)


def comment(rng):
    """-> (text, {tone: strength}). The main tone, perhaps with a word on the topic before it, and
    perhaps with a closing line or a second tone behind it."""
    topic = rng.choice(list(TOPICS))
    tones = {rng.choice(AMBIGUOUS if rng.random() < SHARE_AMBIGUOUS else PLAIN): 1.0}
    (main,) = tones
    parts = [rng.choice(SAYS[main][0])]
    if rng.random() < 0.45:
        parts.append(rng.choice(SAYS[main][1]))
    if rng.random() < SHARE_TWO_TONES:
        second = rng.choice([tone for tone in TONES if tone != main])
        tones[second] = SECOND_TONE
        parts.append("PS: " + rng.choice(SAYS[second][0]))
    if rng.random() < 0.65:
        parts.insert(0, rng.choice(CONTEXT + TOPICS[topic]["fact"]))
    return " ".join(fill(part, topic, rng) for part in parts), tones


class Distinct:
    """Takes a text in if none before it has too many of the same words, by the Jaccard index: the
    words that two texts share, divided by all the words of both."""

    def __init__(self):
        self.sets = []
        self.by_word = {}  # word -> the sets that have it
        self.highest = 0.0

    def similarity(self, text):
        words = set(re.findall(r"\w+", text.lower()))
        shared = {}
        for word in words:
            for i in self.by_word.get(word, ()):
                shared[i] = shared.get(i, 0) + 1
        highest = 0
        for i, n in shared.items():
            highest = max(highest, n / (len(words) + len(self.sets[i]) - n))
        return highest

    def add(self, text):
        words = set(re.findall(r"\w+", text.lower()))
        for word in words:
            self.by_word.setdefault(word, []).append(len(self.sets))
        self.sets.append(words)

    def take(self, text):
        similarity = self.similarity(text)
        if similarity <= TOO_SIMILAR:
            self.highest = max(self.highest, similarity)
            self.add(text)
        return similarity <= TOO_SIMILAR


# -------------------- how readers label
def make_users(rng):
    """{user ID: {trait: value, "ready": how readily labels are ticked}}; a trait halves them."""
    ids = rng.sample(range(10, 100), USERS)
    users = {str(user): {"ready": rng.uniform(-1, 1)} for user in ids}
    for trait in TRAITS:
        signs = [-1, 1] * (USERS // 2)
        rng.shuffle(signs)
        for user, sign in zip(users.values(), signs):
            user[trait] = sign * rng.uniform(0.8, 1)
    return users


def probabilities(tones, user):
    """P(label | text, reader) of every label: sharp sigmoids, a reader is nearly of one mind."""
    weight = dict.fromkeys(LABELS, 0.0)
    for tone, strength in tones.items():
        trait, high, low = TONES[tone]
        lean = (1 + user[trait]) / 2 if trait else 1.0
        for reading, part in ((high, lean), (low, 1 - lean)):
            for label, w in reading.items():
                weight[label] = max(weight[label], strength * part * w)
    weight = np.array([weight[label] for label in LABELS]) * (1 + 0.4 * user["ready"])
    p = 1 / (1 + np.exp(-10 * (weight - 0.5)))
    p[weight.argmax()] += np.prod(1 - p)       # who would tick nothing ticks what fits best
    return p


def tick(p, rng):
    """0/1 labels drawn with probabilities p, and at least one of them 1 (it mostly is at once)."""
    ticks = [int(rng.random() < x) for x in p]
    return ticks if any(ticks) else tick(p, rng)


# -------------------- the yardstick
def best_f1(p):
    """The highest expected F1, 2 sum(p yhat) / (sum yhat + sum p), of all thresholds on p."""
    p = np.sort(p)[::-1]
    return float((2 * np.cumsum(p) / (np.arange(1, len(p) + 1) + p.sum())).max())


def annotate(tones_of, users, rng):
    """-> [(text, user, 0/1 labels, P(label | text, reader), its mean over all readers)]."""
    rows = []
    deck = []
    for text, tones in tones_of.items():
        p = {user: probabilities(tones, users[user]) for user in users}
        mean = np.mean(list(p.values()), axis=0)
        readers = []
        for _ in range(rng.choice(ANNOTATORS_PER_TEXT)):
            if not set(deck) - set(readers):   # dealt from a shuffled deck: all read about as much
                deck += rng.sample(list(users), len(users))
            user = next(user for user in deck if user not in readers)
            deck.remove(user)
            readers.append(user)
            rows.append((text, user, tick(p[user], rng), p[user], mean))
    return rows


def yardstick(rows):
    """What best.json holds: the best F1 without and with the reader known, by label and as mean."""
    test = [row for row in rows if split_of(row[0]) == "test"]
    best = {"rows": len(test),
            "note": "highest expected F1 on the test rows, from the true probabilities"}
    for name, column in (("without_reader", 4), ("with_reader", 3)):
        p = np.array([row[column] for row in test])
        per_label = {label: round(best_f1(p[:, i]), 4) for i, label in enumerate(LABELS)}
        mean = round(sum(per_label.values()) / len(LABELS), 4)
        best[name] = {"f1_macro": mean, "per_label": per_label}
    return best


def write_sample(folder, rows, best, highest):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "annotations.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["text", "user", *LABELS])
        out.writerows([text, user, *ticks] for text, user, ticks, *_ in rows)
    (folder / "best.json").write_text(json.dumps(best, indent=2) + "\n")
    count = Counter(split_of(row[0]) for row in rows)
    (folder / "README.md").write_text(README.format(
        rows=len(rows), texts=len({row[0] for row in rows}), users=len({row[1] for row in rows}),
        highest=highest, labels=", ".join(LABELS), without=best["without_reader"]["f1_macro"],
        known=best["with_reader"]["f1_macro"], **count))


README = """# sample: annotators who do not exist

{rows:,} annotations of {texts:,} made-up comments by {users} simulated annotators: `text`,
`user` and a 0/1 column for each of {labels}.
`data/make_sample.py` writes all of it, seeded; nobody's words and nobody's opinions are in it.

- Each annotator has four traits (thick skin, an ear for irony, trust, a light heart), each near one
  of two poles, and ticks labels more or less readily. A comment has one tone, sometimes a second.
  Ten of the seventeen tones divide the annotators, by the trait that goes with the tone; the
  others are read alike by all.
- Splits are by text (`split_of` in plm.py): {train:,} rows for training, {val} for validation,
  {test} to test. No two comments share more than {highest:.2f} of their words (Jaccard index).
- `best.json`: the best F1-macro that anybody could expect on the test rows, from the true
  probabilities: **{without:.3f}** without knowing who reads, **{known:.3f}** knowing it.

It shows what personalization can gain where readers differ this much, nothing about people.
"""


def main():
    rng = random.Random(SEED)
    users = make_users(rng)
    distinct = Distinct()
    tones_of = {}
    while len(tones_of) < TEXTS:
        text, tones = comment(rng)
        if distinct.take(text):
            tones_of[text] = tones
    rows = annotate(tones_of, users, rng)
    best = yardstick(rows)
    trained = {row[1] for row in rows if split_of(row[0]) == "train"}
    assert trained == set(users), "a reader has no training row"
    write_sample(HERE / "sample", rows, best, distinct.highest)
    print(f"{len(rows)} annotations of {TEXTS} comments; most alike: {distinct.highest:.3f}")
    print(json.dumps(best, indent=2))


if __name__ == "__main__":
    main()
