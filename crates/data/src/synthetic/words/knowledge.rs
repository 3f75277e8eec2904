//! What seedling knows about the world: opposites, colours, kinds, animals' lives, past tenses.

/// Opposites; each pair holds both ways.
pub(crate) const OPPOSITES: &[(&str, &str)] = &[
    ("big", "small"), ("hot", "cold"), ("up", "down"), ("old", "new"), ("fast", "slow"), ("happy", "sad"), ("open", "closed"),
    ("full", "empty"), ("light", "dark"), ("hard", "soft"), ("wet", "dry"), ("clean", "dirty"), ("long", "short"),
    ("high", "low"), ("loud", "quiet"), ("thick", "thin"), ("early", "late"), ("near", "far"),
    ("left", "right"), ("good", "bad"), ("strong", "weak"), ("rich", "poor"), ("first", "last"), ("day", "night"),
    ("yes", "no"), ("in", "out"), ("over", "under"), ("inside", "outside"), ("before", "after"), ("begin", "end"),
    ("win", "lose"), ("push", "pull"), ("give", "take"), ("buy", "sell"), ("sleep", "wake"), ("laugh", "cry"),
    ("remember", "forget"), ("brave", "timid"), ("kind", "cruel"), ("smooth", "rough"),
    ("wide", "narrow"), ("deep", "shallow"), ("sweet", "sour"), ("true", "false"), ("easy", "difficult"), ("always", "never"),
    ("many", "few"), ("come", "go"), ("love", "hate"), ("friend", "enemy"), ("question", "answer"), ("top", "bottom"),
    ("north", "south"), ("east", "west"), ("summer", "winter"), ("rise", "fall"), ("start", "stop"), ("polite", "rude"),
];

/// Things and the colour that they are known for.
pub(crate) const COLOUR_OF: &[(&str, &str)] = &[
    ("a banana", "yellow"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("the sky", "blue"), ("a tomato", "red"),
    ("a carrot", "orange"), ("a lemon", "yellow"), ("milk", "white"), ("chocolate", "brown"), ("a cherry", "red"),
    ("an elephant", "grey"), ("a flamingo", "pink"), ("a frog", "green"), ("a crow", "black"), ("the sun", "yellow"),
    ("a leaf", "green"), ("a swan", "white"), ("blood", "red"), ("a pumpkin", "orange"), ("mud", "brown"), ("a pea", "green"),
    ("a sunflower", "yellow"), ("a strawberry", "red"), ("the sea", "blue"), ("salt", "white"), ("a mole", "black"),
    ("a polar bear", "white"), ("a fir tree", "green"), ("a bluebell", "blue"), ("honey", "golden"), ("a mouse", "grey"),
    ("a plum", "purple"), ("a pig", "pink"), ("toast", "brown"), ("a cucumber", "green"),
];

/// Verbs with their past tense.
pub(crate) const PAST_TENSE: &[(&str, &str)] = &[
    ("go", "went"), ("run", "ran"), ("eat", "ate"), ("see", "saw"), ("find", "found"), ("make", "made"), ("take", "took"),
    ("give", "gave"), ("come", "came"), ("sing", "sang"), ("swim", "swam"), ("write", "wrote"), ("drink", "drank"),
    ("sleep", "slept"), ("buy", "bought"), ("bring", "brought"), ("catch", "caught"), ("think", "thought"), ("fly", "flew"),
    ("draw", "drew"), ("grow", "grew"), ("know", "knew"), ("lose", "lost"), ("build", "built"), ("ride", "rode"),
    ("walk", "walked"), ("play", "played"), ("jump", "jumped"), ("help", "helped"), ("paint", "painted"), ("cook", "cooked"),
    ("open", "opened"), ("carry", "carried"), ("cry", "cried"), ("stop", "stopped"), ("smile", "smiled"), ("hear", "heard"),
    ("hold", "held"), ("keep", "kept"), ("sit", "sat"), ("stand", "stood"), ("tell", "told"), ("win", "won"), ("dig", "dug"),
];

/// One animal's life: name, where it lives, what it eats, what it can do, the sound or sign it is known for.
pub(crate) const LIVES: &[(&str, &str, &str, &str, &str)] = &[
    ("dog", "in a house", "meat and bones", "run fast and smell well", "It barks when a stranger comes."),
    ("cat", "in a house", "fish and mice", "climb trees and see in the dark", "It purrs when it is happy."),
    ("fox", "in a den in the woods", "mice and berries", "hear very small sounds", "Its tail is long and red."),
    ("rabbit", "in a burrow", "grass and carrots", "hop quickly", "Its ears are long and soft."),
    ("bear", "in the forest", "fish, honey and berries", "climb and swim", "It sleeps through the winter."),
    ("horse", "in a stable", "hay and oats", "run far and carry people", "It neighs and shakes its mane."),
    ("cow", "on a farm", "grass and hay", "give milk", "It says moo."),
    ("sheep", "on a farm", "grass", "give wool", "It follows the other sheep."),
    ("duck", "near a pond", "plants and small bugs", "swim and fly", "It says quack."),
    ("owl", "in a hollow tree", "mice", "turn its head far around", "It hunts at night."),
    ("frog", "by a pond", "flies", "jump very far", "It croaks in the evening."),
    ("turtle", "near the water", "leaves and small fish", "hide in its shell", "It walks slowly."),
    ("squirrel", "in a tree", "nuts and seeds", "jump from branch to branch", "It hides food for the winter."),
    ("bee", "in a hive", "nectar from flowers", "make honey", "It buzzes from flower to flower."),
    ("spider", "in a web", "flies", "spin thin threads", "It waits without moving."),
    ("penguin", "on the ice", "fish", "swim fast but not fly", "It slides on its belly."),
    ("whale", "in the sea", "tiny sea animals", "hold its breath for a long time", "It sings under the water."),
    ("camel", "in the desert", "dry plants", "walk for days without water", "It has a hump on its back."),
    ("elephant", "on the wide plain", "leaves and fruit", "lift heavy logs", "It has a long trunk."),
    ("monkey", "in the jungle", "fruit", "swing from tree to tree", "It likes to play tricks."),
    ("hedgehog", "under a hedge", "worms and beetles", "roll into a ball", "It is covered with spines."),
    ("beaver", "in a lodge in the river", "bark and leaves", "build dams", "Its teeth are long and orange."),
    ("mole", "under the ground", "worms", "dig long tunnels", "It can hardly see."),
    ("hen", "in a coop", "corn and seeds", "lay eggs", "It clucks in the morning."),
    ("pig", "in a sty", "corn and roots", "find food with its nose", "It likes to roll in mud."),
    ("crab", "on the shore", "small sea animals", "walk sideways", "It has two strong claws."),
    ("snail", "in the garden", "leaves", "carry its house on its back", "It leaves a shiny trail."),
    ("eagle", "high in the mountains", "fish and rabbits", "see very far", "It glides on the wind."),
    ("dolphin", "in the sea", "fish", "leap out of the water", "It talks with clicks and whistles."),
    ("ant", "in a nest under the ground", "seeds and crumbs", "carry things larger than itself", "It works all day."),
];

/// General truths.
pub(crate) const FACTS: &[&str] = &[
    "The sun rises in the east.", "Water turns to ice when it is very cold.", "Bees make honey.", "A year has twelve months.",
    "A week has seven days.", "Rain falls from the clouds.", "Bread is made from flour.", "Butter is made from milk.",
    "Fish live in water.", "Birds build nests in spring.", "The moon shines at night.", "Fire is hot.", "Snow is white and cold.",
    "Plants need light and water to grow.", "Trees lose their leaves in autumn.", "A clock shows the time.",
    "People sleep at night.", "A doctor helps people who are ill.", "A baker bakes bread.", "A farmer grows food.",
    "A teacher works in a school.", "A sailor works on a ship.", "Iron is heavier than wood.", "A feather is very light.",
    "Ice is slippery.", "Candles are made of wax.", "Wool comes from sheep.", "Eggs come from hens.", "Apples grow on trees.",
    "Potatoes grow under the ground.", "A map shows the way.", "An umbrella keeps the rain off.", "A key opens a lock.",
    "Books are kept in a library.", "Boats float on water.", "Stones sink in water.", "Honey is sweet.", "Lemons are sour.",
    "The sea is salty.", "Winter is colder than summer.",
];
