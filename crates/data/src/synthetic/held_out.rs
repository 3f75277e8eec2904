//! Skills that the pretraining mixture leaves out, each with exact answers: what adapters are trained and measured on.
//!
//! All are in chat form with one user turn. The words are known to the model; the output form or the rule is new.

use super::draw::Draw;
use super::grammar::{Scene, article};
use super::lists;
use super::sample::{Sample, Task};
use super::skill::Skill;
use super::words::{modifiers, nouns, people};

/// The code word of each category of [`Skill::Labels`].
pub const LABELS: [(&str, &str); 4] = [("animal", "zor"), ("food", "mip"), ("tool", "kel"), ("plant", "tav")];

/// The invented units of [`Skill::Units`]: one of the first is so many of the second.
pub const UNITS: [(&str, u64, &str); 3] = [("glim", 3, "drob"), ("drob", 2, "fen"), ("quill", 5, "glim")];

/// A sample of a held-out skill.
pub(crate) fn sample(skill: Skill, draw: &mut Draw) -> Sample {
    let task = match skill {
        Skill::Slots => slots(draw),
        Skill::Labels => labels(draw),
        Skill::Units => units(draw),
        _ => list(skill, draw),
    };
    Sample::chat(skill, task)
}

/// `name: Mia; age: 7; city: Oakham` to `{"name": "Mia", "age": 7, "city": "Oakham"}`.
fn slots(draw: &mut Draw) -> Task {
    let name = people::person(draw).0;
    let mut fields = vec![("name", name.to_owned())];
    let mut others = draw.distinct(&["age", "city", "pet", "food", "colour", "job"], 2);
    others.sort_unstable();
    for key in others {
        let value = match key {
            "age" => draw.between(3, 90).to_string(),
            "city" => draw.word(nouns::TOWNS).to_owned(),
            "pet" => draw.word(nouns::ANIMALS).to_owned(),
            "food" => draw.word(nouns::DISHES).to_owned(),
            "colour" => draw.word(modifiers::COLOURS).to_owned(),
            _ => draw.word(people::JOBS).to_owned(),
        };
        fields.push((key, value));
    }
    let shown: Vec<String> = fields.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    let json: Vec<String> = fields
        .iter()
        .map(
            |(key, value)| {
                if *key == "age" { format!("\"{key}\": {value}") } else { format!("\"{key}\": \"{value}\"") }
            },
        )
        .collect();
    let user = shown.join("; ");
    Task::exact(format!("slots|{user}"), user, format!("{{{}}}", json.join(", ")))
}

/// Sentences in which any of the four categories may stand; nothing else in them gives the category away.
const NEUTRAL: &[&str] = &[
    "{s} saw {one} {@spot}.",
    "There is {one} {@spot}.",
    "{The} is {@spot}.",
    "{s} drew a picture of {one}.",
    "{s} gave {one} to {r}.",
    "{s} found {one} near the {@room}.",
    "{r} asked {s} about {the}.",
    "Yesterday {s} dreamed of {one}.",
    "{s} bought {one} in {@town}.",
    "{The} belongs to {s}.",
    "{s} talked about {the} all day.",
    "~Look at {the}!~ said {s}.",
];

fn labels(draw: &mut Draw) -> Task {
    let which = draw.below(LABELS.len());
    let dish = which == 1 && draw.chance(30);
    let list = match which {
        0 => nouns::ANIMALS,
        1 if dish => nouns::DISHES,
        1 => nouns::SNACKS,
        2 => nouns::TOOLS,
        _ => nouns::PLANTS,
    };
    let noun = draw.word(list);
    let mut scene = Scene::default();
    let pair = people::people(draw, 2);
    scene.set("s", pair[0].0).set("r", pair[1].0);
    scene.set("one", if dish { format!("some {noun}") } else { format!("{} {noun}", article(noun)) });
    scene.set("the", format!("the {noun}"));
    let text = scene.say(draw.word(NEUTRAL), draw);
    Task::exact(format!("labels|{text}"), format!("Label: {text}"), LABELS[which].1)
}

fn units(draw: &mut Draw) -> Task {
    let (from, factor, to) = *draw.pick(&UNITS);
    let count = draw.between(2, 20);
    let name = people::person(draw).0;
    let user = match draw.below(3) {
        0 => format!("{name} has {count} {from}s. How many {to}s is that?"),
        1 => format!("{name} wants to change {count} {from}s into {to}s."),
        _ => format!("How many {to}s are the {count} {from}s of {name}?"),
    };
    Task::exact(user.clone(), user, format!("{} {to}s", count * factor))
}

/// Rules on a list of three to seven words.
fn list(skill: Skill, draw: &mut Draw) -> Task {
    let count = 3 + draw.below(5);
    let mut items = lists::words(draw, count);
    let key = |name: &str, items: &[String]| format!("{name}|{}", items.join(" "));
    match skill {
        Skill::Tally => {
            let (first, last) = (&items[0], &items[count - 1]);
            let answer = format!("{count} items: {first}..{last}");
            Task::exact(key("tally", &items), format!("Tally: {}", items.join(", ")), answer)
        }
        Skill::Swap => {
            let (key, user) = (key("swap", &items), format!("Swap: {}", items.join(" ")));
            items.swap(0, count - 1);
            Task::exact(key, user, items.join(" "))
        }
        _ => {
            let (key, user) = (key("rotate", &items), format!("Rule: {}", items.join(" ")));
            if skill == Skill::RotateLeft {
                items.rotate_left(1)
            } else {
                items.rotate_right(1)
            }
            Task::exact(key, user, items.join(" "))
        }
    }
}
