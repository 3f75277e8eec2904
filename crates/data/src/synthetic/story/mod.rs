//! Short stories: somebody with a wish, something in the way, and how it ends. Three to ten sentences.
//!
//! A story is an opening (who and where), one plot (stages in order, some left out at random) and sometimes a closing. All stages
//! share one scene, so that names, pronouns, colours and places stay the same from the first sentence to the last.

mod courage;
mod making;
mod meeting;
mod trouble;

use super::draw::Draw;
use super::grammar::Scene;
use super::words::actions::ACTIONS;
use super::words::{modifiers, nouns, people};

/// How often the stage appears, in percent, and its variants.
pub(crate) type Stage = (usize, &'static [&'static str]);

/// A plot: stages in order.
pub(crate) type Plot = &'static [Stage];

const OPENINGS: &[&str] = &[
    "[Once upon a time|Long ago|Many years ago], there was a {trait} {kind} [named|called] {hero}.",
    "[Once upon a time|Once], a {trait} {kind} [named|called] {hero} lived [near {place}|in {town}|in a {@colour} house in {town}].",
    "{hero} was a {trait} {kind} [from {town}|who lived near {place}|who lived in {town}].",
    "{hero} was a {trait} {kind}. {He} lived [near {place}|in a small house with {his} {elder}|in {town} with {his} {elder}].",
    "In [the town|the village] of {town} lived a {trait} {kind} named {hero}.",
    "There once was a {kind} called {hero}. {He} was very {trait}.",
    "{Title} [lived near {place}|had a little house in {town}|was known in {town} for being {trait}].",
    "[Near {place}|Not far from {place}|In {town}] there lived a {kind}. {His} name was {hero}.",
    "This is the story of {hero}, a {trait} {kind} from {town}.",
    "Everyone in {town} knew {hero}, the {trait} {kind}.",
];

const DETAILS: &[&str] = &[
    "{He} liked {mass}, and {he} liked {fruits} even more.",
    "{He} always wore a {colour2} {@clothes}.",
    "{His} best friend was {paltitle}.",
    "Every {@day}, {he} {p} {o}.",
    "{He} often {p} {o}.",
    "People said that nobody was as {trait} as {hero}.",
    "{He} had a {@thing}, a {@thing} and not much more.",
    "In {his} garden stood a {colour2} {@vehicle} and a tall {plant}.",
    "{He} did not have much money, but {he} was happy.",
    "{His} {elder} always said that {he} was a good {kind}.",
    "{He} knew every {@animal} {at}.",
    "{He} wanted to see the world, but {he} had never been farther than {place2}.",
];

const CLOSINGS: &[&str] = &[
    "That night {hero} slept very well.",
    "{hero} never forgot that day.",
    "From then on, {hero} and {pal} [met every {@day}|were the best of friends|always helped each other].",
    "[On the way home|That evening|At last], {hero} [smiled|sang a little song|felt calm and happy].",
    "And that was the end of a long day.",
    "It was the best {@day} of the year.",
    "~What a day!~ said {pal}, and they both laughed.",
    "When {he} came home, {his} {elder} [gave {him} warm {mass}|wanted to hear all about it|hugged {him}].",
    "{hero} told {his} {elder} everything, and {his} {elder} was proud.",
    "They celebrated with {mass} and {fruits}.",
    "People in {town} still tell this story.",
];

/// What a story must contain, where somebody asked for it.
#[derive(Default, Clone, Copy)]
pub(crate) struct Wish {
    /// What the hero is: an animal, `girl`, `boy` or a job.
    pub(crate) kind: Option<&'static str>,
    /// A thing that the plot must mention.
    pub(crate) thing: Option<&'static str>,
    /// The hero's name and whether female.
    pub(crate) name: Option<(&'static str, bool)>,
    /// Where it happens: an index into the list of places.
    pub(crate) place: Option<usize>,
}

/// A story and the sentences that it is made of.
pub(crate) struct Story {
    /// Opening, stages, closing; each one or more sentences.
    pub(crate) parts: Vec<String>,
}

impl Story {
    /// The story as one paragraph.
    pub(crate) fn text(&self) -> String {
        self.parts.join(" ")
    }
}

/// A story at random.
pub(crate) fn story(draw: &mut Draw) -> Story {
    tell(draw, Wish::default())
}

/// A story that grants a wish. Plots that do not mention the wished thing are drawn again.
pub(crate) fn tell(draw: &mut Draw, wish: Wish) -> Story {
    loop {
        let scene = cast(draw, wish);
        let told = compose(draw, &scene);
        let text = told.text();
        let granted = wish.thing.is_none_or(|thing| text.contains(&format!(" {thing}")))
            && wish.place.is_none_or(|at| text.contains(nouns::PLACES[at % nouns::PLACES.len()].1));
        if granted {
            return told;
        }
    }
}

/// Draws everybody and everything that the plots speak of.
fn cast(draw: &mut Draw, wish: Wish) -> Scene {
    let mut scene = Scene::default();
    let kind = wish.kind.unwrap_or_else(|| match draw.below(100) {
        0..45 => {
            if draw.chance(50) {
                "girl"
            } else {
                "boy"
            }
        }
        45..80 => draw.word(nouns::HEROES),
        _ => draw.word(people::JOBS),
    });
    let beast = nouns::ANIMALS.contains(&kind);
    let (name, female) = wish.name.unwrap_or_else(|| match kind {
        "girl" => (draw.word(people::GIRLS), true),
        "boy" => (draw.word(people::BOYS), false),
        _ if beast => (draw.word(people::PETS), draw.chance(50)),
        _ => people::person(draw),
    });
    scene.set("hero", name).set("kind", kind).pronouns(["he", "him", "his", "himself"], female);

    let (mut pal, mut pal_female) = people::person(draw);
    while pal == name {
        (pal, pal_female) = people::person(draw);
    }
    let pal_kind = if beast {
        pal = draw.word(people::PETS);
        while pal == name {
            pal = draw.word(people::PETS);
        }
        let mut other = draw.word(nouns::HEROES);
        while other == kind {
            other = draw.word(nouns::HEROES);
        }
        other
    } else if matches!(kind, "girl" | "boy") {
        if pal_female { "girl" } else { "boy" }
    } else {
        draw.word(people::JOBS)
    };
    scene.set("pal", pal).set("palkind", pal_kind).pronouns(["phe", "phim", "phis", "phimself"], pal_female);

    let child = |kind: &str| matches!(kind, "girl" | "boy");
    let title = |name: &str, kind: &str| {
        if child(kind) { format!("little {name}") } else { format!("{name} the {kind}") }
    };
    scene.set("title", title(name, kind));
    let pal_title = if child(pal_kind) { format!("a {pal_kind} named {pal}") } else { title(pal, pal_kind) };
    scene.set("paltitle", pal_title);
    let act = draw.pick(ACTIONS);
    let object = scene.fragment(act.4, draw);
    scene.set("p", act.2).set("o", object).set("worker", draw.word(people::JOBS));

    let (elder, elder_female) = *draw.pick(people::FAMILY);
    scene.set("elder", elder).pronouns(["ehe", "ehim", "ehis", "ehimself"], elder_female);

    let at = wish.place.unwrap_or_else(|| draw.below(nouns::PLACES.len())) % nouns::PLACES.len();
    let (preposition, place) = nouns::PLACES[at];
    let (other_preposition, other) =
        nouns::PLACES[(at + 1 + draw.below(nouns::PLACES.len() - 1)) % nouns::PLACES.len()];
    scene.set("place", format!("the {place}")).set("at", format!("{preposition} the {place}"));
    scene.set("place2", format!("the {other}")).set("at2", format!("{other_preposition} the {other}"));

    let things = draw.distinct(nouns::THINGS, 2);
    scene.set("thing", wish.thing.unwrap_or(things[0]));
    scene.set("thing2", if wish.thing == Some(things[1]) { things[0] } else { things[1] });
    let snack = draw.word(nouns::SNACKS);
    scene.set("fruit", snack).set("fruits", super::words::plural(snack)).set("mass", draw.word(nouns::DISHES));
    let mut animal = draw.word(nouns::ANIMALS);
    while animal == kind || animal == pal_kind {
        animal = draw.word(nouns::ANIMALS);
    }
    scene.set("animal", animal).set("tool", draw.word(nouns::TOOLS)).set("plant", draw.word(nouns::PLANTS));
    let colours = draw.distinct(modifiers::COLOURS, 2);
    scene.set("colour", colours[0]).set("colour2", colours[1]);
    scene.set("trait", draw.word(modifiers::TRAITS)).set("town", draw.word(nouns::TOWNS));
    scene.set("day", draw.word(modifiers::DAYS)).set("spot", draw.word(nouns::SPOTS));
    scene.set("petname", draw.word(people::PETS));
    scene.set("num", modifiers::NUMBERS[2 + draw.below(9)]);
    scene
}

fn compose(draw: &mut Draw, scene: &Scene) -> Story {
    let plots = [making::PLOTS, trouble::PLOTS, meeting::PLOTS, courage::PLOTS].concat();
    let plot = *draw.pick(&plots);
    let mut parts = vec![scene.say(draw.word(OPENINGS), draw)];
    if draw.chance(40) {
        parts.push(scene.say(draw.word(DETAILS), draw));
    }
    for (percent, variants) in plot {
        if draw.chance(*percent) {
            parts.push(scene.say(draw.word(variants), draw));
        }
    }
    if draw.chance(45) {
        let closing = scene.say(draw.word(CLOSINGS), draw);
        let pal = scene.get("pal");
        // A friend who took no part does not turn up at the end.
        if !closing.contains(pal) || parts.iter().any(|part| part.contains(pal)) {
            parts.push(closing);
        }
    }
    introduce(draw, scene, &mut parts);
    Story { parts }
}

/// Says who the friend is where the story names the friend for the first time without saying so.
fn introduce(draw: &mut Draw, scene: &Scene, parts: &mut [String]) {
    let pal = scene.get("pal");
    let Some(part) = parts.iter_mut().find(|part| part.contains(pal)) else {
        return;
    };
    let Some(at) = part.find(pal) else { return };
    let (before, after) = (&part[..at], &part[at + pal.len()..]);
    let quoted = before.matches('"').count() % 2 == 1;
    let known = ["and ", "friend ", "named ", "new ", "was "].iter().any(|word| before.ends_with(word));
    if quoted || known || after.starts_with(" the ") || after.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return;
    }
    let who = draw.word(&["friend", "friend", "best friend", "old friend", "neighbour", "cousin"]);
    let opens = before.is_empty() || before.ends_with(". ") || before.ends_with("! ") || before.ends_with("? ");
    let his = scene.get("his");
    let his = if opens { super::grammar::capital(his) } else { his.to_owned() };
    *part = format!("{before}{his} {who} {pal}{after}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plot_expands_every_variant_without_leftovers() {
        let plots = [making::PLOTS, trouble::PLOTS, meeting::PLOTS, courage::PLOTS].concat();
        assert!(plots.len() >= 18);
        for (number, plot) in plots.iter().enumerate() {
            for (stage, (_, variants)) in plot.iter().enumerate() {
                for variant in *variants {
                    for index in 0..20 {
                        let mut draw = Draw::new(7, variant, number as u64, index, stage as u64);
                        let scene = cast(&mut draw, Wish::default());
                        let said = scene.say(variant, &mut draw);
                        assert!(
                            !said.contains(['{', '}', '[', ']', '|', '~', '@']),
                            "plot {number} stage {stage}: {said}"
                        );
                        assert!(said.ends_with(['.', '!', '?', '"']), "plot {number} stage {stage}: {said}");
                        assert_eq!(said.matches('"').count() % 2, 0, "plot {number} stage {stage}: {said}");
                        assert!(!said.contains("  ") && !said.contains(" ."), "plot {number} stage {stage}: {said}");
                    }
                }
            }
        }
    }
}
