//! Nouns by kind. `ANIMALS`, `SNACKS`, `DISHES`, `TOOLS` and `PLANTS` share no word: classification tasks rely on it.

/// Animals.
pub(crate) const ANIMALS: &[&str] = &[
    "dog", "cat", "fox", "rabbit", "mouse", "bear", "wolf", "deer", "horse", "cow", "pig", "sheep", "goat", "duck", "goose",
    "hen", "owl", "frog", "turtle", "snake", "squirrel", "hedgehog", "badger", "otter", "beaver", "mole", "crow", "robin",
    "swan", "eagle", "parrot", "pony", "donkey", "lamb", "kitten", "puppy", "lion", "tiger", "monkey", "elephant", "giraffe",
    "zebra", "camel", "penguin", "whale", "dolphin", "crab", "snail", "bee", "ant", "spider", "butterfly",
];

/// Animals small enough to be the hero of a story.
pub(crate) const HEROES: &[&str] = &[
    "dog", "cat", "fox", "rabbit", "mouse", "bear", "duck", "goose", "hen", "owl", "frog", "turtle", "squirrel", "hedgehog",
    "badger", "otter", "beaver", "mole", "crow", "robin", "pony", "donkey", "lamb", "kitten", "puppy", "monkey", "penguin",
    "snail", "goat", "pig",
];

/// Food that is counted.
pub(crate) const SNACKS: &[&str] = &[
    "apple", "pear", "plum", "peach", "cherry", "banana", "orange", "lemon", "grape", "melon", "berry", "carrot", "potato",
    "onion", "tomato", "pumpkin", "bean", "nut", "egg", "cookie", "cake", "pie", "bun", "pancake", "muffin", "sandwich",
    "mushroom", "turnip", "radish", "biscuit", "dumpling", "waffle",
];

/// Food that is not counted.
pub(crate) const DISHES: &[&str] = &[
    "bread", "soup", "cheese", "rice", "honey", "jam", "butter", "porridge", "stew", "pasta", "salad", "toast", "pudding",
    "popcorn", "chocolate", "yogurt",
];

/// Drinks.
pub(crate) const DRINKS: &[&str] = &["milk", "tea", "water", "juice", "cocoa", "lemonade", "cider", "coffee"];

/// Tools.
pub(crate) const TOOLS: &[&str] = &[
    "hammer", "saw", "shovel", "rake", "axe", "drill", "wrench", "broom", "ladder", "bucket", "rope", "needle", "knife",
    "brush", "hoe", "chisel", "pump", "hook", "screwdriver", "spade", "mop", "trowel", "lever", "crowbar", "clamp",
    "wheelbarrow", "anvil", "sickle", "sponge", "ruler",
];

/// Plants.
pub(crate) const PLANTS: &[&str] = &[
    "rose", "tulip", "daisy", "lily", "violet", "oak", "pine", "maple", "willow", "birch", "fern", "ivy", "thistle", "cactus",
    "reed", "bush", "poppy", "sunflower", "daffodil", "bluebell", "elm", "palm", "vine", "hedge", "nettle", "orchid",
    "clover", "cedar", "beech", "lilac",
];

/// Clothes, each one piece.
pub(crate) const CLOTHES: &[&str] = &[
    "hat", "coat", "scarf", "shirt", "dress", "sweater", "boot", "glove", "sock", "belt", "cap", "jacket", "apron", "cloak",
    "skirt", "vest", "mitten", "shoe",
];

/// Things that one person can carry.
pub(crate) const THINGS: &[&str] = &[
    "ball", "kite", "doll", "drum", "puzzle", "marble", "balloon", "whistle", "book", "lamp", "key", "box", "basket", "bag",
    "cup", "bowl", "plate", "spoon", "clock", "bell", "candle", "mirror", "blanket", "pillow", "picture", "map", "letter",
    "pen", "pencil", "coin", "ring", "shell", "feather", "stone", "button", "ribbon", "umbrella", "lantern", "flute",
    "hat", "scarf", "glove", "notebook", "teapot", "jar", "bottle", "compass", "wallet", "necklace", "toy boat",
];

/// Things one rides in or on.
pub(crate) const VEHICLES: &[&str] = &["boat", "cart", "bus", "train", "bike", "wagon", "truck", "ship", "sled", "car", "tractor", "tram"];

/// Musical instruments.
pub(crate) const INSTRUMENTS: &[&str] = &["flute", "drum", "violin", "guitar", "trumpet", "piano", "harp", "horn", "fiddle", "cello"];

/// Where a small thing may lie.
pub(crate) const SPOTS: &[&str] = &[
    "on the table", "under the bed", "in the box", "behind the door", "in the drawer", "on the shelf", "under the chair",
    "in the basket", "beside the lamp", "on the window sill", "under the stairs", "in the cupboard", "near the gate",
    "behind the curtain", "on the roof", "in the cart", "under the bridge", "beside the well", "in the tall grass",
    "under the old tree", "on the bench", "in the barn", "behind the clock", "in the kitchen", "on the floor", "in the bag",
    "beside the stove", "in the hall", "on the porch", "under the carpet",
];

/// Rooms.
pub(crate) const ROOMS: &[&str] = &["kitchen", "bedroom", "hall", "attic", "cellar", "garage", "workshop", "classroom", "library", "shed"];

/// Places, each with the word for being there.
pub(crate) const PLACES: &[(&str, &str)] = &[
    ("in", "forest"), ("in", "garden"), ("at", "market"), ("by", "river"), ("by", "lake"), ("on", "hill"), ("on", "beach"),
    ("on", "farm"), ("at", "school"), ("at", "library"), ("in", "village"), ("at", "mill"), ("at", "bakery"), ("in", "barn"),
    ("at", "castle"), ("in", "cave"), ("in", "park"), ("at", "shop"), ("at", "station"), ("at", "harbour"), ("in", "meadow"),
    ("in", "valley"), ("at", "museum"), ("in", "orchard"), ("in", "field"), ("by", "pond"), ("on", "playground"),
    ("on", "island"), ("at", "tower"), ("at", "inn"), ("by", "sea"), ("in", "woods"), ("at", "fair"), ("at", "old bridge"),
    ("in", "town square"), ("by", "waterfall"),
];

/// Invented towns.
pub(crate) const TOWNS: &[&str] = &[
    "Oakham", "Redmill", "Ashford", "Brookdale", "Fernley", "Hillview", "Stonebridge", "Elmwood", "Riverton", "Westbrook",
    "Greenfield", "Maplewood", "Northgate", "Willowby", "Harborne", "Millbrook", "Foxhill", "Kingsley", "Lakeside",
    "Thornbury", "Birchwood", "Clearwater", "Summerfield", "Winterton",
];
