"""Word lists and sentence templates of the story grammar in ``writing.py``.

In templates ``{N}`` is the main person's name, ``{he}`` and ``{his}`` are pronouns, ``{F}`` a friend.
"""

HE = ("Tom", "Sam", "Ben", "Max", "Leo", "Jack", "Paul", "Omar", "Finn", "Hugo")
SHE = ("Ann", "Mia", "Eva", "Zoe", "Lily", "Rosa", "Nina", "Emma", "Kate", "Ruth")

ROLES = (
    "baker",
    "farmer",
    "sailor",
    "painter",
    "teacher",
    "tailor",
    "doctor",
    "miller",
    "hunter",
    "singer",
    "dancer",
    "gardener",
    "shepherd",
    "soldier",
    "weaver",
    "potter",
    "writer",
    "cook",
    "guard",
    "student",
    "carpenter",
    "fisher",
    "smith",
    "driver",
)
PLACES = (
    "the old mill",
    "the quiet harbour",
    "the dark forest",
    "the stone bridge",
    "the empty market",
    "the high tower",
    "the green valley",
    "the long beach",
    "the deep cave",
    "the small station",
    "the white castle",
    "the village school",
    "the narrow street",
    "the frozen lake",
    "the wide river",
    "the red barn",
    "the city library",
    "the sunny hill",
    "the dusty road",
    "the hidden garden",
    "the lonely island",
    "the ruined church",
    "the busy inn",
    "the steep mountain",
)
FEELINGS = (
    "trembled with fear",
    "jumped for joy",
    "sighed with relief",
    "blushed with pride",
    "wept with sadness",
    "stared in wonder",
    "gasped in surprise",
    "shook with anger",
    "smiled with hope",
    "glowed with love",
    "frowned in doubt",
    "laughed with delight",
    "burned with envy",
    "ached with longing",
    "blinked in confusion",
    "hummed with content",
    "groaned in despair",
    "cheered with courage",
)
ENDS = (
    "planted a tree",
    "shared a warm soup",
    "built a small house",
    "sang until midnight",
    "lit a big fire",
    "painted a blue door",
    "opened a tiny shop",
    "sailed across the bay",
    "baked a sweet pie",
    "danced in the rain",
    "named a new star",
    "watched the sun set",
    "fed the hungry birds",
    "mended the broken fence",
    "wrote a long song",
    "rode home on a cart",
    "made a paper crown",
    "fell asleep under the moon",
)

# What each thing does: the middle of the plot depends on it.
THINGS: dict[str, tuple[str, ...]] = {
    "a brass key": (
        "The key opened a door that had been shut for years.",
        "The key turned in the lock of a big chest.",
        "{N} tried the key, and a secret room opened.",
    ),
    "a red lantern": (
        "The lantern lit a path that nobody knew.",
        "The lantern burned all night and showed the way.",
        "{N} raised the lantern, and the shadows ran away.",
    ),
    "a silver bell": (
        "The bell rang, and people came from far away.",
        "{N} rang the bell, and the storm stopped.",
        "The sound of the bell woke everyone.",
    ),
    "a torn map": (
        "The map led to a well with clear water.",
        "{N} followed the map to a box full of letters.",
        "The map showed a short way through the hills.",
    ),
    "a long rope": (
        "{N} threw the rope and saved a lost goat.",
        "The rope held, and {he} climbed out of a pit.",
        "{N} tied the rope to a cart and pulled it free.",
    ),
    "a small drum": (
        "{N} beat the drum, and the wolves ran away.",
        "The drum called the children together.",
        "The drum gave a beat, and all feet moved.",
    ),
    "a paper kite": (
        "The kite rose and carried a message over the hills.",
        "{N} flew the kite, and a ship saw it.",
        "The kite pulled {N} to the top of a rock.",
    ),
    "a gold coin": (
        "The coin paid for bread for everyone.",
        "{N} gave the coin to a beggar, who told a secret.",
        "The coin bought medicine for a sick child.",
    ),
    "a sealed letter": (
        "The letter told of a lost brother.",
        "{N} read the letter and knew whom to help.",
        "The letter asked for help, and {N} ran at once.",
    ),
    "a music box": (
        "The box played a tune from long ago.",
        "{N} wound the box, and its tune stopped a quarrel.",
        "The tune of the box put a crying baby to sleep.",
    ),
    "a tin whistle": (
        "{N} blew the whistle, and a lost dog came back.",
        "The whistle called a boat out of the fog.",
        "The whistle played, and the birds answered.",
    ),
    "a magic seed": (
        "The seed grew into a ladder of leaves.",
        "{N} watered the seed, and flowers came up at once.",
        "The seed grew fruit that healed the sick.",
    ),
    "a round mirror": (
        "The mirror threw sunlight into the dark.",
        "{N} looked into the mirror and saw the truth.",
        "The mirror flashed, and a ship turned in time.",
    ),
    "a grey cloak": (
        "The cloak hid {N} from the thieves.",
        "{N} put the cloak around a cold child.",
        "The cloak kept the snow away all night.",
    ),
    "an iron pot": (
        "The pot cooked enough food for the whole town.",
        "{N} carried water in the pot and put out the flames.",
        "The pot was never empty, so nobody went hungry.",
    ),
    "a feather pen": (
        "The pen wrote a letter all by itself.",
        "{N} took the pen and wrote down the truth.",
        "The pen drew a bird, and it flew away.",
    ),
    "a broken compass": (
        "The compass pointed to a missing child.",
        "{N} fixed the compass and found the way.",
        "The compass spun and stopped at a secret path.",
    ),
    "a silk thread": (
        "The thread mended a torn sail.",
        "{N} followed the thread out of a maze.",
        "The thread held two broken boards together.",
    ),
    "a wool blanket": (
        "The blanket warmed a freezing traveller.",
        "{N} waved the blanket until help came.",
        "The blanket covered a hole in the roof.",
    ),
    "a wooden ladder": (
        "The ladder reached a cat on the roof.",
        "{N} climbed the ladder and freed a trapped owl.",
        "The ladder made a bridge over the water.",
    ),
    "an odd clock": (
        "The clock stopped, and so did time.",
        "{N} turned the clock back and made one wrong right.",
        "The clock struck thirteen, and a wall moved.",
    ),
    "a glass bottle": (
        "The bottle held a message from a stranger.",
        "{N} opened the bottle, and a sweet smell came out.",
        "The bottle carried a note down to the sea.",
    ),
    "a heavy hammer": (
        "The hammer broke the chain of a prisoner.",
        "{N} swung the hammer and fixed the roof.",
        "The hammer rang on the rock, and water came out.",
    ),
    "a black umbrella": (
        "The umbrella caught the wind and carried {N} along.",
        "{N} held the umbrella over a wet puppy.",
        "The umbrella stopped the hail in time.",
    ),
    "a tall candle": (
        "The candle showed a crack in the wall.",
        "{N} put the candle in a window to guide the boats.",
        "The candle burned for three nights without end.",
    ),
    "a sharp axe": (
        "The axe cut a way through the thorns.",
        "{N} took the axe and freed a man under a trunk.",
        "The axe made a raft out of old logs.",
    ),
}

OPENINGS = (
    "{N} was {who}.",
    "Once there was {who} called {N}.",
    "There lived {who} by the name of {N}.",
    "{N} had always been {who}.",
)
FINDS = (
    "One day {he} went to {where} and found {thing}.",
    "At dawn {he} walked to {where} and saw {thing}.",
    "One night {he} came to {where} and picked up {thing}.",
    "On the way to {where} {he} found {thing}.",
    "A stranger near {where} gave {N} {thing}.",
)
FEELS = (
    "{N} {feeling}.",
    "All at once {he} {feeling}.",
    "For a while {N} {feeling}.",
    "With a full heart {he} {feeling}.",
)
FRIENDS = (
    "A friend named {F} came to help.",
    "{F} saw it all and smiled.",
    "{F} heard about it and came at once.",
    "Nobody had seen it but {F}.",
    '"Well done," said {F}.',
)
CLOSINGS = (
    "In the evening they {end}.",
    "Then {N} and {F} {end}.",
    "After that they {end} together.",
    "At last {N} and {F} {end}.",
)
CLOSINGS_ALONE = ("In the evening {N} {end}.", "Then {he} {end}.", "At last {N} {end}.")
FINISH = "The end."
