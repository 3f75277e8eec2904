//! Plain paragraphs that are not stories: people, animals, places, days, letters, recipes, talks, facts.

use super::draw::Draw;
use super::grammar::{Scene, capital, polish};
use super::sentence;
use super::words::{actions::ACTIONS, knowledge, modifiers, nouns, people};

/// One paragraph.
pub(crate) fn passage(draw: &mut Draw) -> String {
    match draw.below(9) {
        0 => person(draw),
        1 => animal(draw),
        2 => place(draw),
        3 => day(draw),
        4 => letter(draw),
        5 => recipe(draw),
        6 => talk(draw),
        7 => shop(draw),
        _ => mixed(draw),
    }
}

/// Says templates in order, each with its chance in percent.
fn say_all(scene: &Scene, draw: &mut Draw, lines: &[(usize, &'static str)]) -> String {
    let mut said = Vec::with_capacity(lines.len());
    for (percent, line) in lines {
        if draw.chance(*percent) {
            said.push(scene.say(line, draw));
        }
    }
    said.join(" ")
}

fn cast(draw: &mut Draw) -> Scene {
    let mut scene = sentence::deeds(draw);
    let other_female = people::GIRLS.contains(&scene.get("r"));
    scene.pronouns(["rhe", "rhim", "rhis", "rhimself"], other_female);
    scene
        .set("town", draw.word(nouns::TOWNS))
        .set("job", draw.word(people::JOBS))
        .set("pet", draw.word(nouns::ANIMALS));
    scene.set("petname", draw.word(people::PETS)).set("n", modifiers::NUMBERS[2 + draw.below(11)]);
    let things = draw.distinct(nouns::THINGS, 3);
    scene.set("thing", things[0]).set("thing2", things[1]).set("thing3", things[2]);
    let snacks = draw.distinct(nouns::SNACKS, 2);
    scene.set("fruit", snacks[0]).set("fruits", super::words::plural(snacks[0]));
    scene.set("fruit2", snacks[1]).set("fruits2", super::words::plural(snacks[1]));
    scene.set("mass", draw.word(nouns::DISHES)).set("colour", draw.word(modifiers::COLOURS));
    let (preposition, place) = *draw.pick(nouns::PLACES);
    scene.set("place", format!("the {place}")).set("at", format!("{preposition} the {place}"));
    scene
}

fn person(draw: &mut Draw) -> String {
    let scene = cast(draw);
    say_all(
        &scene,
        draw,
        &[
            (
                100,
                "{s} is [a {@trait} {job}|a {job} who is {@trait} and {@trait}|{n} years old|a {@trait} person] from {town}.",
            ),
            (80, "{He} lives [near {place}|in a {@adj} house near {place}|with {his} {@kin} and a {pet}]."),
            (70, "{He} has a {pet} named {petname}. {petname} is [{@trait}|{@colour} and {@colour}|very {@trait}]."),
            (80, "{He} likes {mass}, but {he} does not like {fruits}."),
            (70, "Every [morning|evening|{@day}], {he} {t} {o}."),
            (60, "In {his} bag {he} always has a {thing}, a {thing2} and a {fruit2}."),
            (60, "{His} best friend is {r}. [They {p2} {o2} {@past}|{r} {t2} {o2}|{r} lives {at}]."),
            (50, "One day {he} wants to {b2} {o2}."),
            (40, "When {he} is {@feeling}, {he} [sings|goes to {place}|talks to {petname}|drinks {@drink}]."),
        ],
    )
}

fn animal(draw: &mut Draw) -> String {
    let (name, home, food, skill, sign) = *draw.pick(knowledge::LIVES);
    let mut scene = Scene::default();
    scene.set("a", name).set("as", super::words::plural(name)).set("home", home).set("food", food).set("skill", skill);
    scene.set("sign", sign);
    let mut lines = [
        (100, "[The {a} lives {home}.|You can find the {a} {home}.|The home of the {a} is {home}.]"),
        (95, "[The {a}|It] eats {food}.[| That is its favourite food.]"),
        (95, "[A {a}|It|The {a}] can {skill}."),
        (90, "{sign}"),
        (
            50,
            "[Many people like the {a}.|A young {a} stays close to its mother.|The {a} sleeps when it is tired, like all animals.]",
        ),
    ];
    let tail = draw.below(4);
    lines[1..4].rotate_left(tail % 3);
    let start = [
        "The {a} is an animal.",
        "Do you know the {a}?",
        "{@girl} wrote about the {a} for school.",
        "{@boy} likes {as}.",
    ];
    let opening = scene.say(draw.word(&start), draw);
    let (colour_thing, colour) = *draw.pick(knowledge::COLOUR_OF);
    let body = say_all(&scene, draw, &lines);
    if draw.chance(30) {
        return format!("{opening} {body} {} is {colour}.", capital(colour_thing));
    }
    format!("{opening} {body}")
}

fn place(draw: &mut Draw) -> String {
    let scene = cast(draw);
    say_all(
        &scene,
        draw,
        &[
            (
                100,
                "[There is a small shop|There is an old house|There is a {@adj} bench|Let me tell you what I saw] {at}.",
            ),
            (80, "[That day|When {s} was there|When I came there|One {@day}], {@weather}."),
            (
                75,
                "A {@trait} {job} [was standing|was working|was sitting] near the {@plant} with a {@tool} and a {thing}.",
            ),
            (75, "[Next to it|On the left|On the right|Behind it] there was a {@adj} {@vehicle} full of {fruits}."),
            (60, "[Two|Three|Four] {@animal+s} [were sleeping in the sun|were looking for food|ran across the road]."),
            (60, "Somebody was [playing the {@instrument}|calling for {s}|laughing|singing] in the distance."),
            (50, "The air smelled of {mass} and {@mass}."),
            (50, "It was [a quiet place|a good place to rest|not far from {town}|the most beautiful place in {town}]."),
        ],
    )
}

fn day(draw: &mut Draw) -> String {
    let scene = cast(draw);
    let start = 5 + draw.below(4);
    let mut text = scene.say("{s} has a [busy|long|quiet|good] day.", draw);
    let verbs = draw.distinct(ACTIONS, 4);
    let mut hour = start;
    for (turn, act) in verbs.iter().enumerate() {
        let object = scene.fragment(act.4, draw);
        let opening = match turn {
            0 => format!("At {} in the morning {}", modifiers::NUMBERS[hour], scene.get("he")),
            1 => format!("At {} o'clock {}", modifiers::NUMBERS[hour], scene.get("he")),
            2 => {
                (*draw.pick(&["After lunch", "At noon", "In the afternoon", "Later"])).to_owned()
                    + " "
                    + scene.get("he")
            }
            _ => {
                (*draw.pick(&["In the evening", "Before bed", "At the end of the day", "Then"])).to_owned()
                    + " "
                    + scene.get("he")
            }
        };
        hour = (hour + 1 + draw.below(2)).min(11);
        text.push(' ');
        text.push_str(&polish(&format!("{opening} {} {object}.", act.1)));
    }
    text.push(' ');
    text.push_str(
        &scene.say("[Then {he} goes to sleep.|At night {he} is {@feeling}.|That is a normal {@day} for {s}.]", draw),
    );
    text
}

fn letter(draw: &mut Draw) -> String {
    let scene = cast(draw);
    let opening = scene.say("Dear {r},", draw);
    let body = say_all(
        &scene,
        draw,
        &[
            (100, "[How are you?|Thank you for your letter.|I hope you are well.|I have good news.|I miss you.]"),
            (90, "[Yesterday|On {@day}|Last week] I {p} {o}."),
            (
                70,
                "Here in {town} it was [very cold|rainy|warm|windy|quiet|foggy|hot|snowy] [all week|on {@day}|yesterday|again][|, but I did not mind].",
            ),
            (60, "My {pet} {petname} is [well|ill|getting old|{@feeling} again]."),
            (60, "I found your {thing}. It was {@spot}."),
            (70, "[Next week|On {@day}|In {@month}] I will {b2} {o2}."),
            (
                70,
                "[Please bring {fruits} and {mass}.|Do you still have my {thing2}?|Will you visit me {@future}?|Please write back soon.]",
            ),
        ],
    );
    let closing = scene.say("[Your friend|Love|Best wishes|See you soon], {s}", draw);
    format!("{opening}\n{body}\n{closing}")
}

fn recipe(draw: &mut Draw) -> String {
    let mut scene = cast(draw);
    let what: &[(&str, &[&str])] = &[
        (
            "{fruit} pie",
            &[
                "wash the {fruits}",
                "cut the {fruits} with a knife",
                "make the dough with flour, butter and {n} eggs",
                "put everything in the oven",
                "wait for {n2} minutes",
            ],
        ),
        (
            "soup",
            &[
                "wash the {fruits} and the potatoes",
                "cut them into small pieces",
                "boil some water in a big pot",
                "put everything into the pot",
                "add salt and some {mass}",
                "stir and wait for {n2} minutes",
            ],
        ),
        (
            "tea",
            &[
                "boil some water",
                "put the leaves in a {colour} teapot",
                "pour the hot water over them",
                "wait for {n} minutes",
                "add some honey or milk",
            ],
        ),
        (
            "a garden",
            &[
                "dig the ground with a spade",
                "take out all the stones",
                "put {n} seeds into the ground",
                "cover them with earth",
                "give them water every day",
            ],
        ),
        (
            "a paper boat",
            &[
                "take a sheet of {colour} paper",
                "fold it in the middle",
                "fold down the corners",
                "pull the sides apart",
                "put the boat on the water",
            ],
        ),
        (
            "a kite",
            &[
                "take two thin sticks and a string",
                "tie the sticks into a cross",
                "cut the {colour} paper",
                "glue the paper to the sticks",
                "add a long tail",
                "wait for the wind",
            ],
        ),
        (
            "a clean {room}",
            &[
                "open the window",
                "put the {thing} and the {thing2} in a box",
                "wipe the table with a sponge",
                "sweep the floor with a broom",
                "take out the dirty {things3}",
            ],
        ),
        (
            "a letter",
            &[
                "take a pen and paper",
                "write the name of {r} at the top",
                "tell {rhim} about {town}",
                "write your name at the end",
                "put it in an envelope",
                "bring it to the post office",
            ],
        ),
    ];
    scene.set("n2", modifiers::NUMBERS[5 + draw.below(16)]).set("room", draw.word(nouns::ROOMS));
    let things = super::words::plural(scene.get("thing3"));
    scene.set("things3", things);
    let (title, steps) = *draw.pick(what);
    let title = scene.fragment(title, draw);
    scene.set("title", title);
    let mut text = scene.say(
        "[This is how {s} makes {title}.|How to make {title}:|{s} showed {r} how to make {title}.|It is not hard to make {title}.|You want to make {title}? Do it like this.]",
        draw,
    );
    let last = steps.len() - 1;
    let numbered = draw.chance(35);
    for (at, step) in steps.iter().enumerate() {
        let step = polish(&scene.fragment(step, draw));
        if numbered {
            text.push_str(&format!("\n{}. {step}.", at + 1));
            continue;
        }
        let word = match at {
            0 => "First",
            at if at == last => draw.word(&["Finally", "Last", "At the end"]),
            _ => draw.word(&["Then", "Next", "After that", "Now"]),
        };
        text.push_str(&format!(" {word}, {}.", step[..1].to_ascii_lowercase() + &step[1..]));
    }
    if !numbered && draw.chance(60) {
        text.push(' ');
        text.push_str(
            &scene.say(
                "[Now it is ready.|That is all.|{s} did it {@past}, and it worked.|{r} says that it is easy.]",
                draw,
            ),
        );
    }
    text
}

fn talk(draw: &mut Draw) -> String {
    let scene = cast(draw);
    let mut text = scene.say(
        "[{s} met {r} {at}.|{s} and {r} were sitting {at}.|On {@day}, {s} called {r}.|{r} knocked at {s}'s door.]",
        draw,
    );
    let exchanges = [
        "~Hello, {r},~ said {s}. ~[How are you?|Nice to see you. How are you?|You look {@feeling}.]~ ~I am {@feeling},~ said {r}.",
        "~Have you seen my {thing}?~ asked {s}. ~[It is {@spot}|No, I have not|Yes, {@spot}],~ [said|answered] {r}.",
        "~I {p} {o} {@past},~ said {s}. ~[Really|Was it fun|Were you alone]?~ asked {r}.",
        "~What will you do {@future}?~ asked {r}. ~I will {b2} {o2},~ said {s}.",
        "~Do you like {mass}?~ asked {s}. ~[Yes, very much|No, I like {fruits} better|Only with {@mass}],~ said {r}.",
        "~Look, a {@adj} {@animal}!~ said {r}. ~[I see it|Where|It is looking at us],~ said {s}.",
        "~How many {fruits} do you have?~ asked {r}. ~I have {n},~ said {s}. ~[Take one|You can have two|They are for my {@kin}].~",
        "~Who lives in the {colour} house?~ asked {s}. ~A {@trait} {job},~ said {r}.",
        "~It is late,~ said {r}. ~I have to {b} {o}.~",
    ];
    for line in draw.distinct(&exchanges, 2 + (scene.get("n").len() % 2)) {
        text.push(' ');
        text.push_str(&scene.say(line, draw));
    }
    text.push(' ');
    text.push_str(&scene.say("[Then they went home.|They laughed.|~See you {@future}!~ said {r}.|~Goodbye!~ said {s}.|{s} waved and walked away.]", draw));
    text
}

fn shop(draw: &mut Draw) -> String {
    let mut scene = cast(draw);
    let (count, price) = (2 + draw.below(8), 2 + draw.below(4));
    scene.set("count", modifiers::NUMBERS[count]).set("price", modifiers::NUMBERS[price]);
    scene.set("sum", (count * price).to_string());
    say_all(
        &scene,
        draw,
        &[
            (100, "{s} went to a shop in {town} to buy [a {thing} and some {fruits}|{fruits}|food for dinner]."),
            (90, "~Good [morning|day|evening],~ said the [shopkeeper|woman behind the table|old man in the shop]."),
            (100, "~How much is [a {fruit}|one {fruit}]?~ asked {s}. ~{price} coins each.~"),
            (100, "~Then I will take {count} {fruits}.~ ~That makes {sum} coins,~ said the shopkeeper."),
            (70, "{s} paid and put the {fruits} in a {colour} bag."),
            (50, "On the way home {he} gave one {fruit} to {r}."),
        ],
    )
}

/// Sentences about the same two people, some facts between.
fn mixed(draw: &mut Draw) -> String {
    let scene = cast(draw);
    let lines = [
        "{s} {p} {o}.",
        "{r} {p2} {o2}.",
        "{He} was {@feeling}, because {@weather}.",
        "The {thing} was {@spot}.",
        "{He} always looks for {his} {thing2}, but it is {@spot}.",
        "On {@day} they met {at}.",
        "{r} does not like {fruits2}, but {s} does.",
        "{s} gave {r} a {colour} {thing2} and {n} {fruits}.",
        "~I like your {thing},~ said {r}.",
        "~Where is the {pet}?~ asked {s}.",
        "The {pet} was {@spot}.",
        "They went to {place} together.",
        "{r} is a {job}, and {s} wants to be a {job} too.",
    ];
    let count = 3 + draw.below(4);
    let mut said = vec![scene.say("{s} and {r} live in {town}.", draw)];
    for line in draw.distinct(&lines, count) {
        said.push(scene.say(line, draw));
    }
    if draw.chance(30) {
        said.push(draw.word(knowledge::FACTS).to_owned());
    }
    said.join(" ")
}
