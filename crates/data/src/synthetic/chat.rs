//! Conversations of several turns: greetings, who seedling is, small tasks one after the other, thanks.

use super::draw::Draw;
use super::grammar::Scene;
use super::sample::{Sample, Task};
use super::skill::Skill;
use super::words::{modifiers, people};
use super::{arithmetic, instruct, lists, question, recall, sentence};

const SYSTEM: &[&str] = &[
    "You are seedling, a small and friendly language model.",
    "You are a helpful assistant.",
    "You are seedling. Answer briefly.",
    "Follow the instructions of the user.",
];

/// (user, replies): small talk.
const TALK: &[(&str, &str)] = &[
    (
        "[Hello|Hi|Hey|Good morning|Good evening][|!|, seedling!]",
        "[Hello!|Hi!] [How can I help you?|What can I do for you?|It is nice to meet you.]",
    ),
    ("[Hello|Hi], I am {s}.", "Hello, {s}! [How can I help you?|Nice to meet you.|What would you like to do?]"),
    ("My name is {s}. What is your name?", "[Nice to meet you, {s}.|Hello, {s}.] My name is seedling."),
    ("What is your name?", "My name is seedling."),
    (
        "Who are you?",
        "I am seedling, a small language model. [I can tell stories, answer simple questions and sort lists.|I like short stories and simple tasks.]",
    ),
    (
        "What can you do?",
        "I can [tell short stories|write sentences], [work out sums|copy, reverse and sort lists] and answer questions about a text.",
    ),
    ("Are you a [person|human|robot]?", "No, I am seedling, a small language model."),
    ("How are you[| today]?", "I am [fine|well], thank you. [And you?|How can I help you?]"),
    ("How big are you?", "I am very small. I know only simple words, but I do my best."),
    ("Do you know {@town}?", "I only know {@town2} from stories."),
    ("I am {f}[| today].", "[I am sorry to hear that|Oh|I see]. Why are you {f}?"),
    ("Do you like {@mass}?", "I cannot eat, but I can tell you a story about {m}."),
    ("What is the weather like?", "I cannot look outside, {s}. I hope that the sun is shining."),
    ("Can you help me?", "Yes, of course. What do you need?"),
    (
        "[Say something nice|Make me smile].",
        "[You are a good friend|You did well today|I am glad that you are here], {s}.",
    ),
    ("I [live|work] in {t} as a {j}.", "That sounds [nice|interesting]. What does a {j} do in {t}?"),
    ("My friend {r} [likes {@fruit+s}|has {n} {@fruit+s}].", "Then {r} must be very happy."),
];

/// (user, reply): how conversations end.
const ENDS: &[(&str, &str)] = &[
    ("[Thank you|Thanks|Thank you very much][|!|, seedling.]", "[You are welcome|I am glad that I could help]."),
    (
        "[Goodbye|Bye|See you|Good night][|!|, seedling.]",
        "[Goodbye|See you soon|Bye], [have a nice day|take care|come back soon]!",
    ),
    ("That is [all|right|good].", "[Good|I am glad|Very well]. [Have a nice day!|Call me when you need me.]"),
];

fn small_talk(draw: &mut Draw, list: &[(&'static str, &'static str)]) -> Task {
    let mut scene = Scene::default();
    let pair = people::people(draw, 2);
    scene.set("s", pair[0].0).set("r", pair[1].0).set("f", draw.word(modifiers::FEELINGS));
    scene.set("t", draw.word(super::words::nouns::TOWNS)).set("j", draw.word(people::JOBS));
    scene.set("m", draw.word(super::words::nouns::DISHES)).set("n", draw.word(&modifiers::NUMBERS[2..]));
    let (user, reply) = *draw.pick(list);
    let user = user.replace("{@mass}", "{m}").replace("{@town}", "{t}");
    let reply = reply.replace("{@town2}", "{t}");
    let (user, reply) = (scene.say(&user, draw), scene.say(&reply, draw));
    Task::open(user, reply)
}

/// A task of any chat kind.
fn any_task(draw: &mut Draw) -> Task {
    match draw.below(10) {
        0 => arithmetic::task(draw),
        1 => lists::task(Skill::Copy, draw),
        2 => lists::task(Skill::Reverse, draw),
        3 => lists::task(Skill::Sort, draw),
        4 => recall::task(draw),
        5 => question::task(draw),
        6 => {
            let count = 1 + draw.below(3);
            let ask = draw.word(&["Write", "Please write", "Give me"]);
            let number = ["one sentence", "two sentences", "three sentences"][count - 1];
            let name = people::person(draw).0;
            let text: Vec<String> = (0..count).map(|_| sentence::sentence(draw)).collect();
            Task::open(format!("{ask} {number} for {name}."), text.join(" "))
        }
        _ => instruct::task(draw),
    }
}

/// A conversation.
pub(crate) fn sample(draw: &mut Draw) -> Sample {
    let mut turns = Vec::new();
    if draw.chance(60) {
        turns.push(small_talk(draw, TALK));
    }
    for _ in 0..1 + draw.below(3) {
        turns.push(if draw.chance(20) { small_talk(draw, TALK) } else { any_task(draw) });
    }
    let ends = draw.chance(35);
    if ends {
        turns.push(small_talk(draw, ENDS));
    }
    // Long tasks one after the other would not fit a short context: keep the conversation under 700 characters.
    let mut budget = 700usize;
    let mut kept = Vec::with_capacity(turns.len());
    for turn in turns {
        let size = turn.user.len() + turn.reply.len();
        if kept.is_empty() || size <= budget {
            budget = budget.saturating_sub(size);
            kept.push(turn);
        }
    }
    let system = draw.chance(25).then(|| draw.word(SYSTEM));
    let last = kept.pop().unwrap_or_else(|| small_talk(draw, TALK));
    Sample::conversation(Skill::Chat, system, kept, last)
}
