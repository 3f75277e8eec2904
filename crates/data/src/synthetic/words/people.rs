//! People: names, work and family.

use crate::synthetic::draw::Draw;

/// Girls' and women's names.
pub(crate) const GIRLS: &[&str] = &[
    "Anna", "Mia", "Lily", "Emma", "Sara", "Nora", "Ella", "Lucy", "Ruby", "Clara", "Rosa", "Ivy", "Maya", "Zoe", "Alice",
    "Grace", "Hana", "Julia", "Lena", "Molly", "Olive", "Paula", "Rita", "Sofia", "Tina", "Vera", "Wendy", "Amy", "Bella",
    "Cora", "Daisy", "Eva", "Fiona", "Gina", "Helen", "Iris", "Jane", "Kate", "Laura", "Mary", "Nina", "Opal", "Penny",
    "Rachel", "Stella", "Tara", "Una", "Violet", "Willa", "Yara", "Ada", "Beth", "Dora", "Elsa", "Flora", "Greta", "Holly",
    "Joan", "Leah", "Mina",
];

/// Boys' and men's names.
pub(crate) const BOYS: &[&str] = &[
    "Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Noah", "Finn", "Otto", "Hugo", "Paul", "Peter", "Oscar", "Adam", "Luke",
    "Theo", "Ned", "Ravi", "Omar", "Ivan", "Karl", "Liam", "Milo", "Nico", "Owen", "Pablo", "Ralph", "Simon", "Toby", "Victor",
    "Walter", "Alan", "Bruno", "Carl", "David", "Eric", "Felix", "George", "Henry", "Isaac", "James", "Kevin", "Louis",
    "Martin", "Nathan", "Oliver", "Philip", "Robin", "Scott", "Tim", "Will", "Yusuf", "Arthur", "Bert", "Colin", "Dan",
    "Emil", "Frank", "Gus", "Harry",
];

/// Names of animals in stories; either gender.
pub(crate) const PETS: &[&str] = &[
    "Pip", "Bramble", "Biscuit", "Pepper", "Mossy", "Clover", "Dusty", "Hazel", "Nibbles", "Olly", "Patch", "Rusty", "Scout",
    "Tansy", "Tumble", "Whisker", "Acorn", "Bubbles", "Button", "Cinder", "Dot", "Echo", "Fern", "Ginger", "Honey", "Juniper",
    "Maple", "Nutmeg", "Pebble", "Sunny",
];

/// What grown-ups do.
pub(crate) const JOBS: &[&str] = &[
    "baker", "farmer", "teacher", "doctor", "painter", "sailor", "miller", "tailor", "gardener", "builder", "singer", "driver",
    "nurse", "cook", "shepherd", "carpenter", "blacksmith", "librarian", "clockmaker", "potter", "weaver", "pilot", "writer",
    "fisherman", "shopkeeper", "dancer",
];

/// Relatives, each with whether she is female.
pub(crate) const FAMILY: &[(&str, bool)] = &[
    ("mother", true), ("father", false), ("sister", true), ("brother", false), ("grandmother", true), ("grandfather", false),
    ("aunt", true), ("uncle", false),
];

/// A person: name and whether female.
pub(crate) fn person(draw: &mut Draw) -> (&'static str, bool) {
    let female = draw.chance(50);
    (draw.word(if female { GIRLS } else { BOYS }), female)
}

/// `count` people with different names.
pub(crate) fn people(draw: &mut Draw, count: usize) -> Vec<(&'static str, bool)> {
    let mut chosen: Vec<(&'static str, bool)> = Vec::with_capacity(count);
    while chosen.len() < count {
        let next = person(draw);
        if chosen.iter().all(|(name, _)| *name != next.0) {
            chosen.push(next);
        }
    }
    chosen
}

/// Relatives, as words.
pub(crate) const KIN: &[&str] =
    &["mother", "father", "sister", "brother", "grandmother", "grandfather", "aunt", "uncle", "cousin", "friend", "neighbour"];
