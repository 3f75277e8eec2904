//! Simple instructions: stories and sentences on demand, tasks on words and lists, small knowledge.

use super::draw::Draw;
use super::grammar::{article, capital};
use super::sample::Task;
use super::story::{self, Wish};
use super::words::{knowledge, modifiers, nouns, people, plural};
use super::{lists, sentence};

/// One instruction with its reply.
pub(crate) fn task(draw: &mut Draw) -> Task {
    match draw.below(100) {
        0..=19 => tell_story(draw),
        20..=27 => continue_story(draw),
        28..=39 => write_sentence(draw),
        40..=49 => of_list(draw),
        50..=63 => of_word(draw),
        64..=71 => of_sentence(draw),
        72..=79 => opposite(draw),
        80..=84 => colour(draw),
        85..=90 => category(draw),
        91..=95 => name_some(draw),
        _ => calendar(draw),
    }
}

fn with_article(noun: &str) -> String {
    format!("{} {noun}", article(noun))
}

fn tell_story(draw: &mut Draw) -> Task {
    let ask = draw.word(&[
        "Tell me a story about",
        "Write a short story about",
        "Tell a story about",
        "Please tell me a story about",
        "I want to hear a story about",
    ]);
    let kind = match draw.below(3) {
        0 => draw.word(nouns::HEROES),
        1 => draw.word(&["girl", "boy"]),
        _ => draw.word(people::JOBS),
    };
    let thing = draw.word(nouns::THINGS);
    match draw.below(4) {
        0 => {
            let told = story::tell(draw, Wish { kind: Some(kind), ..Wish::default() });
            let extra = draw.word(&["", " who lives in a town", " and a friend", " with a happy end"]);
            Task::open(format!("{ask} {}{extra}.", with_article(kind)), told.text())
        }
        1 => {
            let told = story::tell(draw, Wish { kind: Some(kind), thing: Some(thing), ..Wish::default() });
            Task::open(format!("{ask} {} and {}.", with_article(kind), with_article(thing)), told.text())
        }
        2 => {
            let name = people::person(draw);
            let kind = if draw.chance(60) { if name.1 { "girl" } else { "boy" } } else { draw.word(people::JOBS) };
            let told = story::tell(draw, Wish { kind: Some(kind), name: Some(name), ..Wish::default() });
            Task::open(format!("{ask} {} named {}.", with_article(kind), name.0), told.text())
        }
        _ => {
            let place = draw.below(nouns::PLACES.len());
            let told = story::tell(draw, Wish { kind: Some(kind), place: Some(place), ..Wish::default() });
            let (preposition, noun) = nouns::PLACES[place];
            Task::open(format!("{ask} {} {preposition} the {noun}.", with_article(kind)), told.text())
        }
    }
}

fn continue_story(draw: &mut Draw) -> Task {
    let told = story::story(draw);
    let cut = 2.min(told.parts.len() - 1);
    let ask =
        draw.word(&["Continue this story:", "How does this story go on?", "Finish the story:", "What happens next?"]);
    Task::open(format!("{ask} {}", told.parts[..cut].join(" ")), told.parts[cut..].join(" "))
}

fn write_sentence(draw: &mut Draw) -> Task {
    let word = sentence::any_noun(draw);
    let user = match draw.below(5) {
        0 => format!("Write a sentence with the word {word}."),
        1 => format!("Use the word {word} in a sentence."),
        2 => format!("Make a sentence with {word}."),
        3 => format!("Please write one sentence about {}.", with_article(word)),
        _ => format!("Give me a sentence that has {word} in it."),
    };
    Task::open(user, sentence::sentence_with(draw, word))
}

/// Questions about a list: first, last, n-th, how many, longest, shortest, largest, smallest, is it there.
fn of_list(draw: &mut Draw) -> Task {
    let mut list = lists::items(draw, false);
    let shown = list.join(", ");
    let key = format!("list|{}", list.join(" "));
    let numbers: Vec<u64> = list.iter().filter_map(|item| item.parse().ok()).collect();
    if numbers.len() == list.len() && draw.chance(60) {
        let largest = draw.chance(50);
        let (word, found) =
            if largest { ("largest", numbers.iter().max()) } else { ("smallest", numbers.iter().min()) };
        let found = found.copied().unwrap_or_default();
        return Task::exact(key, format!("Which number is the {word}? {shown}"), found.to_string());
    }
    match draw.below(6) {
        0 => Task::exact(key, format!("What is the first item of this list? {shown}"), list.swap_remove(0)),
        1 => Task::exact(key, format!("What is the last item of this list? {shown}"), list.pop().unwrap_or_default()),
        2 => {
            let at = draw.below(list.len().min(5));
            let place = ["first", "second", "third", "fourth", "fifth"][at];
            Task::exact(key, format!("What is the {place} item? {shown}"), list.swap_remove(at))
        }
        3 => Task::exact(key, format!("How many items are in this list? {shown}"), list.len().to_string()),
        4 => {
            let inside = draw.chance(50);
            let other = lists::words(draw, 1).swap_remove(0);
            let asked = if inside { list[draw.below(list.len())].clone() } else { other };
            let answer = if list.contains(&asked) { "Yes" } else { "No" };
            Task::exact(format!("{key}|{asked}"), format!("Is {asked} in this list? {shown}"), answer)
        }
        _ => {
            let words = lists::words(draw, 3 + extra_words(&list));
            let longest = draw.chance(60);
            let order = |word: &&String| word.len();
            let found = if longest { words.iter().max_by_key(order) } else { words.iter().min_by_key(order) };
            let size = found.map_or(0, |word| word.len());
            // Two words of the winning length leave no single answer: count instead.
            if words.iter().filter(|word| word.len() == size).count() > 1 {
                return Task::exact(key, format!("Count the items: {shown}"), list.len().to_string());
            }
            let word = if longest { "longest" } else { "shortest" };
            let shown = words.join(", ");
            let key = format!("list|{}", words.join(" "));
            Task::exact(key, format!("Which word is the {word}? {shown}"), found.cloned().unwrap_or_default())
        }
    }
}

fn extra_words(list: &[String]) -> usize {
    list.len() % 3
}

/// Tasks on one word: spelling, capitals, plural, past tense, number of letters, number words.
fn of_word(draw: &mut Draw) -> Task {
    let word = loop {
        let word = sentence::any_noun(draw);
        if !word.contains(' ') {
            break word;
        }
    };
    let named = draw.word(&["the word ", "", "this word: "]);
    match draw.below(9) {
        0 | 1 => {
            let spelled: Vec<String> = word.chars().map(String::from).collect();
            Task::exact(format!("spell|{word}"), format!("Spell {named}{word}."), spelled.join("-"))
        }
        2 => Task::exact(
            format!("upper|{word}"),
            format!("Write {named}{word} in capital letters."),
            word.to_ascii_uppercase(),
        ),
        3 => {
            let shouted = word.to_ascii_uppercase();
            Task::exact(format!("lower|{word}"), format!("Write {shouted} in small letters."), word.to_owned())
        }
        4 => Task::exact(format!("plural|{word}"), format!("What is the plural of {word}?"), plural(word)),
        5 => {
            let first = word.chars().next().map(String::from).unwrap_or_default();
            Task::exact(format!("initial|{word}"), format!("What is the first letter of {word}?"), first)
        }
        6 => Task::exact(
            format!("letters|{word}"),
            format!("How many letters are in {named}{word}?"),
            word.len().to_string(),
        ),
        7 => {
            let (base, past) = *draw.pick(knowledge::PAST_TENSE);
            let name = people::person(draw).0;
            let user = match draw.below(3) {
                0 => format!("What is the past of {base}?"),
                1 => format!("Past tense of {base}, please."),
                _ => format!("Today {name} can {base}. Yesterday {name} ...?"),
            };
            Task::exact(user.clone(), user, past)
        }
        _ => {
            let number = draw.below(modifiers::NUMBERS.len());
            let name = people::person(draw).0;
            let as_word = modifiers::NUMBERS[number];
            if draw.chance(50) {
                let user = format!("{name} says {as_word}. Write it as a number.");
                Task::exact(user.clone(), user, number.to_string())
            } else {
                let user = format!("{name} says {number}. Write it as a word.");
                Task::exact(user.clone(), user, as_word)
            }
        }
    }
}

/// Tasks on a sentence: count words, first or last word, repeat, shout.
fn of_sentence(draw: &mut Draw) -> Task {
    let text = loop {
        let text = sentence::sentence(draw);
        if !text.contains(['"', '?', '!']) && text.matches('.').count() == 1 && text.len() < 70 {
            break text;
        }
    };
    let words: Vec<&str> = text.trim_end_matches('.').split(' ').map(|word| word.trim_end_matches(',')).collect();
    let key = format!("sentence|{text}");
    match draw.below(5) {
        0 => Task::exact(key, format!("How many words are in this sentence? {text}"), words.len().to_string()),
        1 => Task::exact(key, format!("What is the first word? {text}"), words[0]),
        2 => Task::exact(key, format!("What is the last word? {text}"), words[words.len() - 1]),
        3 => Task::exact(key, format!("Write this in capital letters: {text}"), text.to_ascii_uppercase()),
        _ => Task::exact(key, format!("Repeat this sentence: {text}"), text),
    }
}

fn opposite(draw: &mut Draw) -> Task {
    let (left, right) = *draw.pick(knowledge::OPPOSITES);
    let (word, other) = if draw.chance(50) { (left, right) } else { (right, left) };
    let name = people::person(draw).0;
    let user = match draw.below(6) {
        0 => format!("What is the opposite of {word}?"),
        1 => format!("Opposite of {word}?"),
        2 => format!("Tell me the opposite of {word}."),
        3 => format!("{name} says {word}. What is the opposite?"),
        4 => format!("Not {word}, but ...?"),
        _ => format!("{name} wants to know the opposite of {word}."),
    };
    Task::exact(user.clone(), user, format!("The opposite of {word} is {other}."))
}

fn colour(draw: &mut Draw) -> Task {
    let (thing, colour) = *draw.pick(knowledge::COLOUR_OF);
    let name = people::person(draw).0;
    let user = match draw.below(4) {
        0 => format!("What colour is {thing}?"),
        1 => format!("{name} asks: what colour is {thing}?"),
        2 => format!("Tell {name} the colour of {thing}."),
        _ => format!("Which colour does {thing} have?"),
    };
    Task::exact(user.clone(), user, capital(&format!("{thing} is {colour}.")))
}

const KINDS: &[(&str, &[&str])] = &[
    ("an animal", nouns::ANIMALS),
    ("a food", nouns::SNACKS),
    ("a tool", nouns::TOOLS),
    ("a plant", nouns::PLANTS),
    ("a vehicle", nouns::VEHICLES),
    ("a job", people::JOBS),
];

fn category(draw: &mut Draw) -> Task {
    let (kind, list) = *draw.pick(KINDS);
    let word = draw.word(list);
    let name = people::person(draw).0;
    let noun = with_article(word);
    let (user, reply) = match draw.below(4) {
        0 => (format!("What kind of thing is {noun}?"), format!("{} is {kind}.", capital(&noun))),
        1 => (format!("{name} asks: what is {noun}?"), format!("{} is {kind}.", capital(&noun))),
        choice => {
            let (asked, _) = if draw.chance(50) { (kind, list) } else { *draw.pick(KINDS) };
            let user = if choice == 2 {
                format!("Is {noun} {asked}?")
            } else {
                format!("{name} wants to know: is {noun} {asked}?")
            };
            let word = if asked == kind { "Yes" } else { "No" };
            (user, format!("{word}, {noun} is {kind}."))
        }
    };
    Task::exact(user.clone(), user, reply)
}

fn name_some(draw: &mut Draw) -> Task {
    let lists: &[(&str, &[&str])] = &[
        ("animals", nouns::ANIMALS),
        ("fruits or vegetables", &nouns::SNACKS[..18]),
        ("tools", nouns::TOOLS),
        ("plants", nouns::PLANTS),
        ("colours", modifiers::COLOURS),
        ("jobs", people::JOBS),
        ("clothes", nouns::CLOTHES),
        ("girls' names", people::GIRLS),
        ("boys' names", people::BOYS),
        ("towns", nouns::TOWNS),
        ("feelings", modifiers::FEELINGS),
        ("musical instruments", nouns::INSTRUMENTS),
        ("days of the week", modifiers::DAYS),
        ("months", modifiers::MONTHS),
    ];
    let (name, list) = *draw.pick(lists);
    let count = 2 + draw.below(4);
    let chosen = draw.distinct(list, count);
    let number = modifiers::NUMBERS[count];
    let who = people::person(draw).0;
    let user = match draw.below(4) {
        0 => format!("Name {number} {name}."),
        1 => format!("Give me a list of {number} {name}."),
        2 => format!("Tell me {number} {name} for {who}."),
        _ => format!("{who} needs {number} {name}."),
    };
    Task::open(user, chosen.join(", "))
}

/// What comes next or before: days, months, numbers, letters.
fn calendar(draw: &mut Draw) -> Task {
    let days = modifiers::DAYS;
    let months = modifiers::MONTHS;
    let next = draw.chance(50);
    let word = if next { "after" } else { "before" };
    let name = people::person(draw).0;
    let opening = draw.word(&["", "Quick: ", "Tell me: ", "Do you know: "]);
    let step = |at: usize, size: usize| {
        if next { (at + 1) % size } else { (at + size - 1) % size }
    };
    let (user, reply) = match draw.below(4) {
        0 => {
            let at = draw.below(days.len());
            (format!("{name} asks: which day comes {word} {}?", days[at]), days[step(at, days.len())].to_owned())
        }
        1 => {
            let at = draw.below(months.len());
            (
                format!("{name} asks: which month comes {word} {}?", months[at]),
                months[step(at, months.len())].to_owned(),
            )
        }
        2 => {
            let number = 1 + draw.below(200);
            (
                format!("{opening}which number comes {word} {number}?"),
                if next { number + 1 } else { number - 1 }.to_string(),
            )
        }
        _ => {
            let start = draw.below(90);
            let count = 4 + draw.below(5);
            let counted: Vec<String> = (start..start + count).map(|n| n.to_string()).collect();
            let (first, last) = (start, start + count - 1);
            if next {
                (format!("{opening}count from {first} to {last}."), counted.join(", "))
            } else {
                let back: Vec<String> = counted.into_iter().rev().collect();
                (format!("{opening}count down from {last} to {first}."), back.join(", "))
            }
        }
    };
    Task::exact(user.clone(), capital(&user), reply)
}
