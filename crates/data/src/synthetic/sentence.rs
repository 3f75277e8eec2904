//! Single sentences and short runs of them: many patterns over actions, things, feelings, causes and facts.

use super::draw::Draw;
use super::grammar::{Scene, capital};
use super::words::{actions::ACTIONS, knowledge, nouns, people};

/// Sentence patterns about a person `{s}` doing things. `{b} {t} {p} {g} {o}` are base, third person, past, -ing and object of
/// the first action; `{b2}`.. of the second. `{r}` is another person.
const DEEDS: &[&str] = &[
    "{s} {p} {o} {@past}.",
    "{s} {p} {o}.",
    "{@past}, {s} {p} {o}.",
    "{s} is {g} {o}.",
    "Right now {s} is {g} {o}.",
    "{s} was {g} {o} when {r} [came home|called|opened the door|arrived|walked in|laughed].",
    "{s} will {b} {o} {@future}.",
    "{s} is going to {b} {o} {@future}.",
    "{s} wants to {b} {o}.",
    "{s} [likes|loves|hopes|needs|plans] to {b} {o}.",
    "{s} [cannot|could not|will not|did not] {b} {o} because {@weather}.",
    "{s} did not {b} {o} because {he} was too {@feeling}.",
    "Because {@weather}, {s} {p} {o}.",
    "{s} {p} {o}, and then {he} {p2} {o2}.",
    "{s} {p} {o}, but {r} {p2} {o2}.",
    "After {g} {o}, {s} {p2} {o2}.",
    "Before {g} {o}, {s} {p2} {o2}.",
    "When {@weather}, {s} {p} {o}.",
    "If it [rains|snows|is warm|is sunny] [tomorrow|on Sunday|tonight], {s} will {b} {o}.",
    "While {s} was {g} {o}, {r} {p2} {o2}.",
    "{s} and {r} {p} {o}[ together| {@past}|].",
    "{s} asked {r} to {b} {o}.",
    "{r} told {s} to {b} {o}.",
    "{s} [never|always|often|sometimes] {t} {o} [in the morning|after school|on {@day}|when {he} is {@feeling}].",
    "Every {@day}, {s} {t} {o}.",
    "{s} {p} {o} [alone|again|for the first time|for an hour|with a smile].",
    "{s} felt {@feeling} after {g} {o}.",
    "{s} was {@feeling}, so {he} {p} {o}.",
    "The {@trait} {@job} {p} {o}.",
    "The {@job} who {p} {o} was very {@feeling}.",
    "My [{@trait} |]{@kin} {p} {o} {@past}.",
    "We {p} {o} {@past}.",
    "I [want|like|have|would like] to {b} {o}.",
    "They are {g} {o}.",
    "Please do not {b} {o}.",
    "Can you {b} {o}?",
    "Did {s} {b} {o}? [Yes, {he} did.|No, {he} did not. {He} {p2} {o2}.]",
    "Does {s} {b} {o}? [Yes, {he} does.|No, {he} does not.|Yes, on {@day}.]",
    "Who {p} {o}? It was {s}.",
    "Why did {s} {b} {o}? Because {he} was {@feeling}.",
    "What is {s} doing? {He} is {g} {o}.",
    "[Last night|Once] {s} dreamed that {he} {p} {o}.",
    "{s} said that {he} had never seen {r} {g} {o}.",
    "It is [hard|easy|fun|not easy] to {b} {o}.",
    "[While|As] {@weather}, {s} and {r} {p} {o}.",
    "{s} smiled because {r} {p} {o}.",
    "{r} is {@feeling} today, but {s} is not.",
    "{s} would like to {b} {o}, but first {he} has to {b2} {o2}.",
    "~[Please|Do not|Never|Always|Let us] {b} {o},~ said {s}.",
    "~I {p} {o},~ said {s}.",
    "~Will you {b} {o}?~ asked {s}. ~[Yes, I will|No, not today|Maybe {@future}|Of course],~ said {r}.",
    "~Why are you {g} {o}?~ asked {r}. ~[Because I am {@feeling}|Because {@weather}|Because I like it],~ said {s}.",
    "{r} saw {s} {g} {o}.",
    "It was {s} who {p} {o}.",
    "{s} is [too young|old enough|strong enough|too {@feeling}] to {b} {o}.",
    "Instead of {g} {o}, {s} {p2} {o2}.",
    "{s} promised to {b} {o} {@future}.",
    "First {s} {p} {o}. Then {he} {p2} {o2}.",
    "{s} had to {b} {o} before {he} could {b2} {o2}.",
];

/// Patterns about things, places, animals and people that need no action.
const STATES: &[&str] = &[
    "The {@adj} {@thing} is {@spot}.",
    "There is a {@adj} {@thing} {@spot}.",
    "There are {@number} {@thing+s} {@spot}.",
    "There was a {@animal} {@spot} {@past}.",
    "{s} has a {@colour} {@thing} and a {@adj} {@thing}.",
    "{s} has {@number} {@animal+s} and {@number} {@animal+s}.",
    "{s} is a {@trait} {@job} from {@town}.",
    "{s} is {@trait} and {@trait}, but {r} is {@trait}.",
    "{s} lives in a {@adj} house near {@town}.",
    "The {@animal} is {@feeling} because {@weather}.",
    "The {@animal} and the {@animal} are [friends|in the same field|near the gate|both {@feeling}].",
    "What a [{@adj}|lovely|strange|beautiful] {@thing}!",
    "This {@thing} is {@adj}, but that {@thing} is {@adj}.",
    "The {@thing} belongs to {s}.",
    "Whose {@thing} is this? It is {r}'s {@thing}.",
    "{s}'s {@clothes} is {@colour}.",
    "The {@clothes} {@spot} is {@colour} and {@colour}.",
    "Where is the {@thing}? It is {@spot}.",
    "What colour is the {@thing}? It is {@colour}.",
    "How many {@fruit+s} are {@spot}? There are {@number}.",
    "A {@animal} is an animal, but a {@tool} is a tool.",
    "A {@plant} is a plant.",
    "{@fruit+s} are good to eat.",
    "You need a {@tool} to do this work.",
    "The {@animal} is [bigger|smaller|faster|slower|older] than the {@animal}.",
    "My {@thing} is [newer|older|heavier|lighter|cleaner] than your {@thing}.",
    "The {@mass} tastes [good|sweet|strange|like [honey|butter|flowers|apples]|better with [salt|butter|honey|milk]].",
    "In {@month}, {s} goes to {@town}.",
    "It is {@day} today, and {s} is {@feeling}.",
    "The {@room} is [{@adj}|too small|very quiet|full of {@thing+s}].",
    "Behind the house there is a {@adj} {@plant}.",
    "The {@plant} near the gate is [tall|green|very old|in bloom|dry].",
    "~This {@thing} is {@adj},~ said {s}. ~[Mine is {@adj}|Where did you find it|I like it|Give it to me],~ said {r}.",
    "~I am {@feeling},~ said {s}.",
    "Neither {s} nor {r} has a {@thing}.",
    "Both {s} and {r} like {@mass}.",
    "If you are {@feeling}, [take a walk|drink some {@drink}|talk to a friend|sit down for a while].",
    "The {@job} has a {@tool}, a {@tool} and a {@tool}.",
    "In the basket there are {@number} {@fruit+s}, {@number} {@fruit+s} and a {@fruit}.",
];

/// Fills the scene with two people and two actions.
pub(crate) fn deeds(draw: &mut Draw) -> Scene {
    let mut scene = Scene::default();
    let pair = people::people(draw, 2);
    scene.set("s", pair[0].0).set("r", pair[1].0);
    scene.pronouns(["he", "him", "his", "himself"], pair[0].1);
    let acts = draw.distinct(ACTIONS, 2);
    let keys = [["b", "t", "p", "g", "o"], ["b2", "t2", "p2", "g2", "o2"]];
    for (act, key) in acts.into_iter().zip(keys) {
        let object = scene.fragment(act.4, draw);
        scene.set(key[0], act.0).set(key[1], act.1).set(key[2], act.2).set(key[3], act.3).set(key[4], object);
    }
    scene
}

/// One sentence (sometimes a question with its answer) of any pattern.
pub(crate) fn sentence(draw: &mut Draw) -> String {
    match draw.below(100) {
        0..60 => {
            let scene = deeds(draw);
            scene.say(draw.word(DEEDS), draw)
        }
        60..93 => {
            let scene = deeds(draw);
            scene.say(draw.word(STATES), draw)
        }
        93..96 => draw.word(knowledge::FACTS).to_owned(),
        _ => {
            let (thing, colour) = *draw.pick(knowledge::COLOUR_OF);
            let verb = *draw.pick(&["is", "is usually", "is mostly"]);
            capital(&format!("{thing} {verb} {colour}."))
        }
    }
}

/// A sentence that holds `word`, which must be a noun of the lexicon that takes an article.
pub(crate) fn sentence_with(draw: &mut Draw, word: &str) -> String {
    let mut scene = deeds(draw);
    scene.set("w", word);
    let patterns: &[&str] = &[
        "{s} saw a {w} {@spot} {@past}.",
        "The {w} is {@spot}.",
        "There is a {@adj} {w} near the {@room}.",
        "{s} drew a picture of a {w} for {r}.",
        "{r} asked {s} about the {w}.",
        "A {@adj} {w} is all that {s} wants.",
        "The {@job} looked at the {w} and smiled.",
        "{s} has never seen a {w} before.",
        "Yesterday {s} dreamed about a {@adj} {w}.",
        "~Look at that {w}!~ said {s}.",
        "{s} {p} {o} and thought of the {w}.",
        "The {w} was {@adj}, and {s} was {@feeling}.",
        "{s} told {r} a story about a {w} and a {@animal}.",
    ];
    scene.say(draw.word(patterns), draw)
}

/// One to five sentences.
pub(crate) fn run(draw: &mut Draw) -> String {
    let count = 1 + draw.below(5);
    let mut text = String::new();
    for _ in 0..count {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&sentence(draw));
    }
    text
}

/// The classes whose words fit `sentence_with`.
pub(crate) fn any_noun(draw: &mut Draw) -> &'static str {
    let lists =
        [nouns::ANIMALS, nouns::SNACKS, nouns::TOOLS, nouns::PLANTS, nouns::CLOTHES, nouns::THINGS, nouns::VEHICLES];
    let list = *draw.pick(&lists);
    draw.word(list)
}
