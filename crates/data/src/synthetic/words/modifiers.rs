//! Adjectives, adverbs, times, weather and number words.

/// Colours.
pub(crate) const COLOURS: &[&str] =
    &["red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple", "pink", "grey", "gold", "silver"];

/// How a thing looks or is.
pub(crate) const LOOKS: &[&str] = &[
    "big", "small", "old", "new", "little", "tiny", "huge", "heavy", "light", "round", "shiny", "dusty", "clean", "dirty",
    "soft", "hard", "broken", "pretty", "strange", "plain", "bright", "dark", "long", "short", "thin", "thick", "smooth",
    "rough", "warm", "cold", "wet", "dry", "red", "blue", "green", "yellow", "white", "black", "brown", "purple", "golden",
    "wooden", "beautiful", "simple", "lovely", "striped",
];

/// How food is.
pub(crate) const TASTES: &[&str] =
    &["sweet", "sour", "fresh", "warm", "tasty", "ripe", "crunchy", "juicy", "big", "small", "delicious", "round"];

/// Character.
pub(crate) const TRAITS: &[&str] = &[
    "kind", "brave", "shy", "clever", "curious", "gentle", "cheerful", "patient", "quiet", "careful", "friendly", "honest",
    "stubborn", "hard-working", "playful", "polite", "thoughtful", "lively", "dreamy", "young", "funny", "helpful", "calm",
    "proud",
];

/// Feelings.
pub(crate) const FEELINGS: &[&str] = &[
    "happy", "sad", "angry", "tired", "proud", "scared", "hungry", "lonely", "excited", "calm", "nervous", "surprised",
    "worried", "grateful", "bored", "thirsty", "sleepy", "cheerful",
];

/// How something is done.
pub(crate) const ADVERBS: &[&str] = &[
    "quickly", "slowly", "quietly", "carefully", "happily", "gently", "loudly", "proudly", "calmly", "eagerly", "patiently",
    "softly", "bravely", "neatly",
];

/// Days of the week.
pub(crate) const DAYS: &[&str] = &["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// Months.
pub(crate) const MONTHS: &[&str] = &[
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
];

/// When something happened.
pub(crate) const PAST_TIMES: &[&str] = &[
    "yesterday", "last night", "this morning", "last week", "on Monday", "on Tuesday", "on Friday", "on Sunday",
    "after lunch", "before dinner", "last summer", "last winter", "at noon", "in the evening", "an hour ago", "two days ago",
    "after school", "at dawn",
];

/// When something will happen.
pub(crate) const FUTURE_TIMES: &[&str] = &[
    "tomorrow", "tonight", "next week", "on Saturday", "on Wednesday", "after lunch", "before dark", "next summer", "soon",
    "in an hour", "in the morning", "one day",
];

/// Weather, as a clause in the past.
pub(crate) const WEATHER: &[&str] = &[
    "it was raining", "the sun was shining", "it was very cold", "a strong wind was blowing", "snow was falling",
    "the sky was grey", "it was a warm day", "there was thick fog", "the air was fresh", "it was getting dark",
    "the moon was bright", "a storm was coming", "the road was wet", "the stars were out",
];

/// Number words, from zero.
pub(crate) const NUMBERS: &[&str] = &[
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
];
