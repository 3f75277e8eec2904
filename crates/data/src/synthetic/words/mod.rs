//! The lexicon: word classes by meaning, so that a grammar only joins words that belong together.

// Word lists are set as running text; one word a line would fill many screens.
#[rustfmt::skip]
pub(crate) mod actions;
#[rustfmt::skip]
pub(crate) mod knowledge;
#[rustfmt::skip]
pub(crate) mod modifiers;
#[rustfmt::skip]
pub(crate) mod nouns;
#[rustfmt::skip]
pub(crate) mod people;

use nouns as n;

/// The words of a class of the template language, by name.
pub(crate) fn class(name: &str) -> Option<&'static [&'static str]> {
    Some(match name {
        "animal" => n::ANIMALS,
        "fruit" => n::SNACKS,
        "mass" => n::DISHES,
        "drink" => n::DRINKS,
        "tool" => n::TOOLS,
        "plant" => n::PLANTS,
        "clothes" => n::CLOTHES,
        "thing" => n::THINGS,
        "vehicle" => n::VEHICLES,
        "instrument" => n::INSTRUMENTS,
        "spot" => n::SPOTS,
        "town" => n::TOWNS,
        "room" => n::ROOMS,
        "girl" => people::GIRLS,
        "boy" => people::BOYS,
        "job" => people::JOBS,
        "colour" => modifiers::COLOURS,
        "adj" => modifiers::LOOKS,
        "taste" => modifiers::TASTES,
        "trait" => modifiers::TRAITS,
        "feeling" => modifiers::FEELINGS,
        "adverb" => modifiers::ADVERBS,
        "day" => modifiers::DAYS,
        "month" => modifiers::MONTHS,
        "kin" => people::KIN,
        "past" => modifiers::PAST_TIMES,
        "future" => modifiers::FUTURE_TIMES,
        "weather" => modifiers::WEATHER,
        "number" => &modifiers::NUMBERS[2..],
        _ => return None,
    })
}

/// The English plural of a noun of this lexicon.
pub(crate) fn plural(noun: &str) -> String {
    let irregular = match noun {
        "mouse" => "mice",
        "goose" => "geese",
        "wolf" => "wolves",
        "deer" => "deer",
        "sheep" => "sheep",
        "knife" => "knives",
        "leaf" => "leaves",
        "loaf" => "loaves",
        "child" => "children",
        "fish" => "fish",
        "tomato" => "tomatoes",
        "potato" => "potatoes",
        "scarf" => "scarves",
        "shelf" => "shelves",
        "man" => "men",
        "woman" => "women",
        "foot" => "feet",
        "tooth" => "teeth",
        _ => "",
    };
    if !irregular.is_empty() {
        return irregular.to_owned();
    }
    let sibilant = ["s", "x", "z", "ch", "sh"].iter().any(|end| noun.ends_with(end));
    if sibilant {
        return format!("{noun}es");
    }
    match noun.strip_suffix('y') {
        Some(stem) if !stem.ends_with(['a', 'e', 'i', 'o', 'u']) => format!("{stem}ies"),
        _ => format!("{noun}s"),
    }
}
