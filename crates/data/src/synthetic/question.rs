//! Questions about facts that a short passage states.
//!
//! Every fact is about its own person and thing, so each question has one answer. Plain text answers shortly, chat in a sentence.

use super::draw::Draw;
use super::grammar::{Scene, article, capital};
use super::sample::{Sample, Task};
use super::skill::Skill;
use super::words::{modifiers, nouns, people, plural};

/// A fact with its question and both answers.
struct Fact {
    told: String,
    asked: String,
    short: String,
    full: String,
}

/// (statement, question, short answer, full answer); `{s}` the person, `{x}` the thing, `{v}` the value.
const OWNS: &[(&str, &str, &str, &str)] = &[
    ("{s} has [a {@adj} {x}|a {x}].", "Who has the {x}?", "{s}", "{s} has the {x}."),
    ("The {x} belongs to {s}.", "Who owns the {x}?", "{s}", "{s} owns the {x}."),
    ("{s} found a {x} {@past}.", "Who found a {x}?", "{s}", "{s} found a {x}."),
    ("{s} [bought|got] a {x}.", "What did {s} get?", "a {x}", "{s} got a {x}."),
    ("{s} lost a {x}.", "What did {s} lose?", "a {x}", "{s} lost a {x}."),
];

const VALUES: &[(u8, &str, &str, &str, &str)] = &[
    (0, "The {x} is {v}.", "Where is the {x}?", "{v}", "The {x} is {v}."),
    (0, "{s} put the {x} {v}.", "Where is the {x}?", "{v}", "The {x} is {v}."),
    (0, "{s} hid the {x} {v}.", "Where did {s} hide the {x}?", "{v}", "{s} hid the {x} {v}."),
    (1, "The {x} is {v}.", "What colour is the {x}?", "{v}", "The {x} is {v}."),
    (1, "{s} has a {v} {x}.", "What colour is the {x} of {s}?", "{v}", "The {x} of {s} is {v}."),
    (2, "{s} has {v} {xs}.", "How many {xs} does {s} have?", "{v}", "{s} has {v} {xs}."),
    (2, "{s} is {v} years old.", "How old is {s}?", "{v}", "{s} is {v} years old."),
    (2, "{s} sold {v} {xs} [at the market|{@past}].", "How many {xs} did {s} sell?", "{v}", "{s} sold {v} {xs}."),
    (3, "{s} lives in {v}.", "Where does {s} live?", "in {v}", "{s} lives in {v}."),
    (3, "{s} went to {v} {@past}.", "Where did {s} go?", "to {v}", "{s} went to {v}."),
    (4, "{s} ate {v} for [lunch|dinner|breakfast].", "What did {s} eat?", "{v}", "{s} ate {v}."),
    (4, "{s} likes {v}.", "What does {s} like?", "{v}", "{s} likes {v}."),
    (5, "{s} is a {v}.", "What is the job of {s}?", "{v}", "{s} is a {v}."),
    (5, "{s} wants to be a {v}.", "What does {s} want to be?", "a {v}", "{s} wants to be a {v}."),
    (6, "{s} was {v}.", "How did {s} feel?", "{v}", "{s} was {v}."),
    (7, "{s} will come on {v}.", "When will {s} come?", "on {v}", "{s} will come on {v}."),
    (7, "{s} was born in {v2}.", "When was {s} born?", "in {v2}", "{s} was born in {v2}."),
    (8, "{s} has a {v} named {pet}.", "What is the {v} of {s} called?", "{pet}", "The {v} of {s} is called {pet}."),
    (8, "{s} saw a {v} {@spot}.", "What did {s} see?", "a {v}", "{s} saw a {v}."),
    (9, "{s} was {f} because {he} {v}.", "Why was {s} {f}?", "because {he} {v}", "{s} was {f} because {he} {v}."),
];

const CAUSES: &[(&str, &str)] = &[
    ("sad", "lost a ring"),
    ("sad", "had to go home"),
    ("happy", "found a friend"),
    ("happy", "won the race"),
    ("tired", "worked all night"),
    ("tired", "walked ten miles"),
    ("angry", "missed the bus"),
    ("angry", "broke a cup"),
    ("proud", "fixed the roof"),
    ("proud", "could swim"),
    ("scared", "saw a snake"),
    ("scared", "heard a noise"),
    ("hungry", "forgot to eat"),
    ("late", "slept too long"),
    ("wet", "fell into the lake"),
    ("cold", "had no coat"),
    ("excited", "got a letter"),
    ("worried", "could not find the key"),
    ("bored", "had nothing to read"),
    ("happy", "got a puppy"),
];

fn fact(draw: &mut Draw, who: (&'static str, bool), thing: &'static str) -> Fact {
    let mut scene = Scene::default();
    scene.set("s", who.0).set("x", thing).set("xs", plural(thing)).pronouns(["he", "him", "his", "himself"], who.1);
    if draw.chance(25) {
        let (told, asked, short, full) = *draw.pick(OWNS);
        return say(&scene, draw, told, asked, short, full);
    }
    let (kind, told, asked, short, full) = *draw.pick(VALUES);
    let value = match kind {
        0 => draw.word(nouns::SPOTS).to_owned(),
        1 => draw.word(modifiers::COLOURS).to_owned(),
        2 => draw.between(2, 19).to_string(),
        3 => draw.word(nouns::TOWNS).to_owned(),
        4 => match draw.below(2) {
            0 => draw.word(nouns::DISHES).to_owned(),
            _ => plural(draw.word(nouns::SNACKS)),
        },
        5 => draw.word(people::JOBS).to_owned(),
        6 => draw.word(modifiers::FEELINGS).to_owned(),
        7 => draw.word(modifiers::DAYS).to_owned(),
        8 => draw.word(nouns::ANIMALS).to_owned(),
        _ => {
            let (feeling, cause) = *draw.pick(CAUSES);
            scene.set("f", feeling);
            cause.to_owned()
        }
    };
    scene.set("v", value).set("v2", draw.word(modifiers::MONTHS)).set("pet", draw.word(people::PETS));
    say(&scene, draw, told, asked, short, full)
}

fn say(scene: &Scene, draw: &mut Draw, told: &str, asked: &str, short: &str, full: &str) -> Fact {
    let mut short = scene.fragment(short, draw);
    // Fragments are not polished: "a owl".
    if let Some(noun) = short.strip_prefix("a ") {
        short = format!("{} {noun}", article(noun));
    }
    Fact { told: scene.say(told, draw), asked: scene.say(asked, draw), short, full: scene.say(full, draw) }
}

/// A passage of two to six facts, in the order told.
fn facts(draw: &mut Draw) -> (Vec<Fact>, String) {
    let count = 2 + draw.below(5);
    let who = people::people(draw, count);
    let things = draw.distinct(nouns::THINGS, count);
    let facts: Vec<Fact> = who.into_iter().zip(things).map(|(who, thing)| fact(draw, who, thing)).collect();
    let passage = facts.iter().map(|fact| fact.told.as_str()).collect::<Vec<_>>().join(" ");
    (facts, passage)
}

/// A passage with its question, in plain or chat form.
pub(crate) fn sample(draw: &mut Draw) -> Sample {
    if draw.chance(50) {
        return Sample::chat(Skill::Question, task(draw));
    }
    let (facts, passage) = facts(draw);
    let mut order: Vec<usize> = (0..facts.len()).collect();
    draw.shuffle(&mut order);
    order.truncate(1 + draw.below(3));
    let (question, answer) = *draw.pick(&[("Question:", "Answer:"), ("Q:", "A:")]);
    let mut prompt = passage.clone();
    for (turn, at) in order.iter().enumerate() {
        if turn > 0 {
            prompt.push_str(&format!(" {}", facts[order[turn - 1]].short));
        }
        prompt.push_str(&format!("\n{question} {}\n{answer}", facts[*at].asked));
    }
    let last = &facts[order[order.len() - 1]];
    Sample::plain(Skill::Question, format!("question|{passage}|{}", last.asked), prompt, last.short.clone())
}

/// A passage with its question in chat form; at times the passage has no answer.
pub(crate) fn task(draw: &mut Draw) -> Task {
    let (mut facts, passage) = facts(draw);
    let wanted = facts.swap_remove(draw.below(facts.len()));
    let (mut asked, mut reply) = (wanted.asked, wanted.full);
    if draw.chance(8) {
        let mut stranger = people::person(draw);
        while passage.contains(stranger.0) {
            stranger = people::person(draw);
        }
        let thing = draw.word(nouns::THINGS);
        let other = fact(draw, stranger, thing);
        if other.asked.contains(stranger.0) {
            asked = other.asked;
            reply = format!("The text does not say anything about {}.", stranger.0);
        }
    }
    if draw.chance(15)
        && let Some((yes_no, answer)) = check(draw, &wanted.told)
    {
        (asked, reply) = (yes_no, answer);
    }
    let user = match draw.below(4) {
        0 => format!("{passage}\n{asked}"),
        1 => format!("Read this: {passage} {asked}"),
        2 => format!("{passage}\nQuestion: {asked}"),
        _ => format!("Text: {passage}\nAnswer this question: {asked}"),
    };
    Task::exact(format!("question|{passage}|{asked}"), user, reply)
}

/// A yes-or-no question about a statement of the form "The x is v." with a colour.
fn check(draw: &mut Draw, told: &str) -> Option<(String, String)> {
    let (subject, value) = told.strip_suffix('.')?.split_once(" is ")?;
    if !subject.starts_with("The ") || !modifiers::COLOURS.contains(&value) {
        return None;
    }
    let other = if draw.chance(50) { value } else { draw.word(modifiers::COLOURS) };
    let subject = subject.replacen("The", "the", 1);
    let answer =
        if other == value { format!("Yes, {subject} is {value}.") } else { format!("No, {subject} is {value}.") };
    Some((capital(&format!("is {subject} {other}?")), answer))
}
