//! Sums, differences and small products: as bare facts, worked digit by digit, and as word problems.
//!
//! The key of a task is `a op b`, so that the same sum in another phrasing stays on the same side of the split.

use super::draw::Draw;
use super::grammar::Scene;
use super::sample::{Sample, Task};
use super::skill::Skill;
use super::words::{nouns, people, plural};

/// One operation with its result.
#[derive(Clone, Copy)]
struct Sum {
    a: u64,
    b: u64,
    op: char,
}

impl Sum {
    /// Numbers below `limit`; products have one factor below ten.
    fn draw(draw: &mut Draw, limit: u64) -> Self {
        match draw.below(10) {
            0..=3 => Self { a: draw.between(1, limit), b: draw.between(1, limit), op: '+' },
            4..=7 => {
                let (a, b) = (draw.between(1, limit), draw.between(1, limit));
                Self { a: a.max(b), b: a.min(b), op: '-' }
            }
            _ => Self { a: draw.between(2, if limit > 99 { 99 } else { 12 }), b: draw.between(2, 9), op: '*' },
        }
    }

    fn result(self) -> u64 {
        match self.op {
            '+' => self.a + self.b,
            '-' => self.a.saturating_sub(self.b),
            _ => self.a * self.b,
        }
    }

    fn text(self) -> String {
        format!("{} {} {}", self.a, self.op, self.b)
    }

    /// The work, one line a column for sums and differences, one line a partial product for products; then the result.
    fn worked(self) -> String {
        match self.op {
            '+' => self.worked_sum(),
            '-' => self.worked_difference(),
            _ => self.worked_product(),
        }
    }

    fn worked_sum(self) -> String {
        let (mut a, mut b, mut carry) = (self.a, self.b, 0);
        let mut lines = String::new();
        for column in ["ones", "tens", "hundreds", "thousands"] {
            if a == 0 && b == 0 && carry == 0 {
                break;
            }
            let (x, y) = (a % 10, b % 10);
            let total = x + y + carry;
            let carried = if carry > 0 { " + 1" } else { "" };
            lines.push_str(&format!("{column}: {x} + {y}{carried} = {total}, write {}", total % 10));
            carry = total / 10;
            if carry > 0 {
                lines.push_str(", carry 1");
            }
            lines.push('\n');
            (a, b) = (a / 10, b / 10);
        }
        format!("{lines}{} = {}", self.text(), self.result())
    }

    fn worked_difference(self) -> String {
        let (mut a, mut b, mut borrow) = (self.a, self.b, 0);
        let mut lines = String::new();
        for column in ["ones", "tens", "hundreds", "thousands"] {
            if a == 0 && b == 0 {
                break;
            }
            let (x, y) = (a % 10, b % 10 + borrow);
            let lent = if borrow > 0 { " - 1" } else { "" };
            if x >= y {
                lines.push_str(&format!("{column}: {x} - {}{lent} = {}, write {}\n", b % 10, x - y, x - y));
                borrow = 0;
            } else {
                let digit = x + 10 - y;
                lines.push_str(&format!(
                    "{column}: {} - {}{lent} = {digit}, write {digit}, borrow 1\n",
                    x + 10,
                    b % 10
                ));
                borrow = 1;
            }
            (a, b) = (a / 10, b / 10);
        }
        format!("{lines}{} = {}", self.text(), self.result())
    }

    fn worked_product(self) -> String {
        let (mut rest, mut place, mut parts) = (self.a, 1, Vec::new());
        let mut lines = String::new();
        while rest > 0 {
            let part = rest % 10 * place;
            if part > 0 {
                lines.push_str(&format!("{part} * {} = {}\n", self.b, part * self.b));
                parts.push((part * self.b).to_string());
            }
            (rest, place) = (rest / 10, place * 10);
        }
        if parts.len() > 1 {
            lines.push_str(&format!("{} = {}\n", parts.join(" + "), self.result()));
        }
        format!("{lines}{} = {}", self.text(), self.result())
    }
}

/// An arithmetic sample in plain or chat form.
pub(crate) fn sample(draw: &mut Draw) -> Sample {
    if draw.chance(50) {
        return Sample::chat(Skill::Arithmetic, task(draw));
    }
    match draw.below(4) {
        0 => {
            let limit = *draw.pick(&[9, 20, 99]);
            let mut prompt = String::new();
            for _ in 0..draw.below(6) {
                let sum = Sum::draw(draw, limit);
                prompt.push_str(&format!("{} = {}\n", sum.text(), sum.result()));
            }
            let sum = Sum::draw(draw, limit);
            prompt.push_str(&format!("{} =", sum.text()));
            Sample::plain(Skill::Arithmetic, sum.text(), prompt, sum.result().to_string())
        }
        1 => {
            let (sum, story, answer) = problem(draw);
            Sample::plain(Skill::Arithmetic, sum.text(), format!("Question: {story}\nAnswer:"), answer)
        }
        _ => {
            let limit = *draw.pick(&[99, 999]);
            let sum = Sum::draw(draw, limit);
            Sample::plain(Skill::Arithmetic, sum.text(), format!("Work out {}:", sum.text()), sum.worked())
        }
    }
}

/// An arithmetic task in chat form.
pub(crate) fn task(draw: &mut Draw) -> Task {
    match draw.below(4) {
        0 => {
            let limit = *draw.pick(&[9, 20, 99]);
            let sum = Sum::draw(draw, limit);
            let user = match draw.below(4) {
                0 => format!("What is {}?", sum.text()),
                1 => format!("{} = ?", sum.text()),
                2 => format!("Compute {}.", sum.text()),
                _ => format!("How much is {}?", sum.text()),
            };
            Task::exact(sum.text(), user, format!("{} = {}", sum.text(), sum.result()))
        }
        1 => {
            let (sum, story, answer) = problem(draw);
            Task::exact(sum.text(), story, answer)
        }
        _ => {
            let limit = *draw.pick(&[99, 999]);
            let sum = Sum::draw(draw, limit);
            let user = match draw.below(4) {
                0 => format!("What is {}? Show your work.", sum.text()),
                1 => format!("Compute {} step by step.", sum.text()),
                2 => format!("Work out {}.", sum.text()),
                _ => format!("Step by step: {}", sum.text()),
            };
            Task::exact(sum.text(), user, sum.worked())
        }
    }
}

/// A word problem: the sum, the question, the answer with its working.
fn problem(draw: &mut Draw) -> (Sum, String, String) {
    let mut scene = Scene::default();
    let pair = people::people(draw, 2);
    scene.set("s", pair[0].0).set("r", pair[1].0).pronouns(["he", "him", "his", "himself"], pair[0].1);
    let list = *draw.pick(&[nouns::SNACKS, nouns::THINGS]);
    let item = draw.word(list);
    scene.set("xs", plural(item)).set("box", draw.word(&["box", "basket", "bag", "jar"]));
    let (op, patterns): (char, &[(&str, &str)]) = match draw.below(3) {
        0 => (
            '+',
            &[
                (
                    "{s} has {a} {xs}. {He} [gets|buys|finds] {b} more. How many {xs} does {s} have now?",
                    "{s} has {c} {xs}.",
                ),
                (
                    "{s} has {a} {xs}, and {r} has {b} {xs}. How many {xs} do they have together?",
                    "Together they have {c} {xs}.",
                ),
                (
                    "There are {a} {xs} in the {box} and {b} {xs} on the table. How many {xs} are there?",
                    "There are {c} {xs}.",
                ),
                ("{s} is {a} years old. How old will {he} be in {b} years?", "{s} will be {c} years old."),
            ],
        ),
        1 => (
            '-',
            &[
                (
                    "{s} has {a} {xs}. {He} [gives {b} to {r}|loses {b}|sells {b}]. How many {xs} are left?",
                    "There are {c} {xs} left.",
                ),
                (
                    "There were {a} {xs} in the {box}. {r} took {b} of them. How many {xs} are left?",
                    "There are {c} {xs} left.",
                ),
                ("{s} has {a} {xs} and {r} has {b}. How many more {xs} does {s} have?", "{s} has {c} more {xs}."),
                (
                    "A {box} costs {a} coins. {s} has {b} coins. How many coins does {he} still need?",
                    "{s} needs {c} coins.",
                ),
            ],
        ),
        _ => (
            '*',
            &[
                ("There are {b} {xs} in each {box}. How many {xs} are in {a} of them?", "There are {c} {xs}."),
                ("One {box} costs {b} coins. {s} buys {a}. How many coins does {he} pay?", "{s} pays {c} coins."),
                ("{s} reads {b} pages every day. How many pages does {he} read in {a} days?", "{s} reads {c} pages."),
            ],
        ),
    };
    let (low, high) = if op == '*' { (2, 9) } else { (2, *draw.pick(&[20, 50, 99])) };
    let (x, y) = (draw.between(low, high), draw.between(low, high));
    // Nobody is left with nothing: a difference is at least one.
    let sum = Sum { a: if op == '-' { x.max(y) + 1 } else { x }, b: if op == '-' { x.min(y) } else { y }, op };
    scene.set("a", sum.a.to_string()).set("b", sum.b.to_string()).set("c", sum.result().to_string());
    let (question, answer) = *draw.pick(patterns);
    let question = scene.say(question, draw);
    // "1 lamps" is no English; the key still counts the sum.
    let answer = scene.say(answer, draw).replace(&format!(" 1 {}", plural(item)), &format!(" 1 {item}"));
    let answer = answer.replace("There are 1 ", "There is 1 ").replace("needs 1 coins", "needs 1 coin");
    let question = if draw.chance(15) { format!("{question} {}", draw.word(HINTS)) } else { question };
    (sum, question, format!("{} = {}. {answer}", sum.text(), sum.result()))
}

/// Hints that change the phrasing, never the answer.
const HINTS: &[&str] = &["Please think first.", "Take your time.", "Write the sum first."];
