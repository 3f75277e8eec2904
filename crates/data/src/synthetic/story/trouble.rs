//! Plots about something that goes wrong: lost, broken, stuck, carried away by the wind.

use super::Plot;

/// The plots of this file.
pub(crate) const PLOTS: &[Plot] = &[LOST_THING, BROKEN_THING, STUCK, LOST_WAY, FIRE_OUT, RUNAWAY];

const LOST_THING: Plot = &[
    (
        100,
        &[
            "One [morning|evening|day|afternoon], {hero} could not find {his} {colour} {thing}.",
            "{He} had a {colour} {thing} that {he} loved more than anything. On {day}, it was gone.",
            "On {day}, {hero} lost {his} {thing} somewhere {at}.",
            "One day {hero} put {his} hand in {his} bag, and the {thing} was not there.",
            "{hero} always carried a {colour} {thing}. But one [windy|rainy|busy] day it [fell out of {his} bag|was nowhere to be seen].",
        ],
    ),
    (
        90,
        &[
            "{He} looked {@spot} and {@spot}, but it was not there.",
            "{He} searched {at} and {at2}, but {he} found only a {thing2}.",
            "{He} asked the {@job} and the {@job}, but nobody had seen it.",
            "First {he} looked in the {@room}. Then {he} looked in the {@room}. There was no {thing} anywhere.",
            "{He} went back to {place} and looked under every leaf and stone.",
        ],
    ),
    (
        70,
        &[
            "{hero} [felt sad|was worried|wanted to cry] and sat down on [a step|a stone|the ground].",
            "~I will never see it again,~ {he} [thought|said].",
            "~My [poor|lovely|dear] {thing}!~ said {hero}.",
            "{hero} was so sad that {he} could not eat {his} {mass}.",
        ],
    ),
    (
        100,
        &[
            "{His} friend {pal} came by. ~[What is wrong|Why are you so sad|What are you looking for]?~ asked {pal}. ~I lost my {thing},~ said {hero}.",
            "Then {paltitle} [came along|stopped to help]. ~Let us look together,~ {phe} said.",
            "{pal} heard about it and [ran to help|came at once]. ~When did you last see it?~ {phe} asked.",
            "{pal} said, ~Think. Where were you this morning?~ ~I was {at2},~ said {hero}.",
        ],
    ),
    (
        100,
        &[
            "Together they [searched|looked] until {pal} saw something {colour} {@spot}. It was the {thing}!",
            "They walked to {place2}. There, {@spot}, lay the {thing}.",
            "They followed some small footprints and found a {animal}. The {animal} was [sleeping on|playing with|sitting next to] the {thing}!",
            "{pal} looked up and began to laugh. The {thing} was [in a tree|on the roof|in {hero}'s own pocket] the whole time.",
        ],
    ),
    (
        85,
        &[
            "{hero} [thanked|hugged] {pal} and promised to be more careful.",
            "~Thank you,~ said {hero}. ~[You are a true friend|I could not do it without you|Next time I will take better care of it].~",
            "{hero} gave {pal} [a {fruit}|half of {his} {mass}|a big hug] to say thank you.",
            "After that, {hero} always kept the {thing} [in a safe place|close to {him}|{@spot}].",
        ],
    ),
];

const BROKEN_THING: Plot = &[
    (
        100,
        &[
            "One day {hero} was [running|dancing|playing] in the {@room} and [hit|knocked over] {his} {elder}'s {thing}. It broke.",
            "{hero} wanted to [clean|move|see] the old {thing} of {his} {elder}, but it slipped and broke.",
            "On {day}, {hero} heard a loud crack. {He} had sat down on {his} {elder}'s {thing}.",
        ],
    ),
    (
        100,
        &[
            "{hero} was scared. ~[Should I hide it|What should I do|What will my {elder} say]?~ {he} thought.",
            "First {he} wanted to hide the pieces {@spot}.",
            "{He} wanted to say that the {animal} did it. But that was not true.",
            "~Nobody saw me,~ {he} thought. But {he} did not feel good.",
        ],
    ),
    (
        60,
        &[
            "All day {he} could not [eat|play|think of anything else].",
            "~You look sad,~ said {pal}. ~Tell the truth. It is always better.~",
            "At dinner {he} did not touch {his} {mass}.",
        ],
    ),
    (
        100,
        &[
            "At last {he} went to {his} {elder} and said, ~I broke your {thing}. I am sorry.~",
            "In the evening {he} told {his} {elder} the truth.",
            "{hero} took a deep breath and told {his} {elder} what had happened.",
        ],
    ),
    (
        100,
        &[
            "{His} {elder} was quiet for a moment. ~Thank you for telling me,~ {ehe} said. ~A {thing} can be fixed.~",
            "{His} {elder} was not angry. ~It was only a {thing},~ {ehe} said. ~The truth is worth more.~",
            "{His} {elder} [smiled|nodded]. ~I am glad that you are honest,~ {ehe} said.",
        ],
    ),
    (
        80,
        &[
            "Together they [put the pieces back|fixed it with glue and a {tool}|made a new one].",
            "The next day they bought a new {colour} {thing} at the market, and {hero} paid with {his} own coins.",
            "Then they sat down and had some {mass}.",
        ],
    ),
];

const STUCK: Plot = &[
    (
        100,
        &[
            "One [windy|sunny|cool] day, {hero} was {at} and heard a [soft|small|sad] cry.",
            "On the way to {place}, {hero} heard somebody calling for help.",
            "{hero} was eating a {fruit} {at} when {he} heard a strange sound.",
        ],
    ),
    (
        100,
        &[
            "A {animal} was stuck [in the mud|between two rocks|under a fallen branch|in an old net|behind a fence].",
            "It was a little {animal}. Its leg was caught [under a log|in a rope|in the fence].",
            "A young {animal} had fallen into a [deep hole|dry well|ditch] and could not get out.",
        ],
    ),
    (
        85,
        &[
            "{hero} pulled and pulled, but {he} was not strong enough.",
            "~Do not be afraid,~ said {hero}. {He} tried to reach it with {his} hands, but it was too far.",
            "{He} tried with a stick, but the stick broke.",
        ],
    ),
    (
        100,
        &[
            "Then {he} had an idea. {He} ran home and came back with a {tool} and {his} friend {pal}.",
            "{He} called {pal}, and {pal} brought a long rope.",
            "~I need help!~ {he} shouted. {pal} heard it and came running with a {tool}.",
        ],
    ),
    (
        100,
        &[
            "Together they worked [for an hour|slowly and carefully|until it was dark]. At last the {animal} was free.",
            "One, two, three! They pulled together, and the {animal} was free.",
            "{pal} held {hero}, and {hero} reached down. Soon the {animal} was safe.",
        ],
    ),
    (
        75,
        &[
            "The {animal} [looked at them and ran away|was hungry, so they gave it some {mass}|followed {hero} all the way home].",
            "Every {day} after that, the {animal} came to visit {hero}.",
            "{hero} was tired and dirty, but very [happy|proud].",
        ],
    ),
];

const LOST_WAY: Plot = &[
    (
        100,
        &[
            "One day {hero} followed a {colour} butterfly and walked farther and farther away from {place}.",
            "{hero} wanted to visit {his} {elder} in {town}, so {he} took a new path.",
            "On {day}, {hero} went out to pick {fruits} and did not look where {he} was going.",
        ],
    ),
    (
        100,
        &[
            "[Soon|After a while|When {he} looked up], all the trees looked the same, and {he} did not know the way home.",
            "Then thick fog came, and {he} could not see the road any more.",
            "The path ended. It was getting dark, and {he} was alone.",
        ],
    ),
    (
        75,
        &[
            "~[Which way should I go|How will I get home]?~ said {hero}. {His} voice was very small.",
            "{He} was [cold|hungry|tired] and a little scared, but {he} did not cry.",
            "{He} sat down and ate {his} last {fruit}.",
        ],
    ),
    (
        100,
        &[
            "Then {he} met an old {animal}. ~[Follow the river|Walk to the tall {plant}|Look for the north star],~ said the {animal}. ~It will lead you home.~",
            "Then {he} remembered what {his} {elder} had told {him}: ~When you are lost, stay calm and listen.~ Far away, {he} heard a bell.",
            "Then {he} saw a light between the trees. It was {pal} with a lantern!",
            "{He} climbed a hill and looked around. Far away {he} saw the {colour} roof of the mill.",
        ],
    ),
    (
        100,
        &[
            "{hero} walked and walked, and at last {he} saw {his} own house.",
            "Step by step {he} found the way back to {place}.",
            "{He} was home before the moon was high.",
        ],
    ),
    (
        80,
        &[
            "{His} {elder} was waiting at the door. ~I was so worried!~ {ehe} said.",
            "{His} {elder} gave {him} [a bowl of hot {mass}|a warm blanket|a long hug].",
            "From that day on, {hero} always [took a map|told somebody where {he} was going|remembered the way].",
        ],
    ),
];

const FIRE_OUT: Plot = &[
    (
        100,
        &[
            "In {@month} the fire in the oven of the bakery in {town} went out, and nobody could bake bread.",
            "One cold day the {@job} of {town} was ill, and there was nobody to do the work.",
            "One {day}, the old bridge near {place} fell down, and nobody could cross the river.",
            "One summer there was no rain, and the well of {town} was dry.",
        ],
    ),
    (
        90,
        &[
            "People [were worried|did not know what to do|talked about it all day].",
            "~What now?~ asked {pal}.",
            "Everyone looked at everyone else.",
        ],
    ),
    (
        100,
        &[
            "~I can help,~ said {hero}. Some people laughed, because {he} was only a {kind}.",
            "{hero} thought about it all night. In the morning {he} had a plan.",
            "{hero} said, ~If we all work together, we can do it.~",
        ],
    ),
    (
        100,
        &[
            "{He} asked everyone to bring one thing: a {tool}, a {@tool}, some wood, a {thing}.",
            "{He} worked from morning to night, and {pal} helped {him}.",
            "{He} showed the others what to do, and soon {num} people were at work.",
        ],
    ),
    (
        100,
        &[
            "After {num} days everything was as it should be, and the people of {town} [cheered|danced in the street|thanked {hero}].",
            "By {@day} it was done. Even the [mayor|oldest man in town] came to see it.",
            "It took a long time, but in the end it worked.",
        ],
    ),
    (
        60,
        &[
            "They gave {hero} a {colour} {thing2}, and {he} kept it for the rest of {his} life.",
            "~Small hands can do big things,~ said {his} {elder}.",
            "Now nobody laughed at {hero} any more.",
        ],
    ),
];

const RUNAWAY: Plot = &[
    (
        100,
        &[
            "{hero} had a {colour} kite. One day the wind took it and carried it over {place}.",
            "{hero} was looking after {his} {elder}'s {animal}. {He} left the gate open, and the {animal} ran away.",
            "{hero} made a little boat of paper, but the river took it away.",
        ],
    ),
    (
        100,
        &[
            "{He} ran after it, [past the mill|over the bridge|through the field|past {place2}], as fast as {he} could.",
            "~Stop!~ shouted {hero}. But it did not stop.",
            "{He} ran until {he} was out of breath.",
        ],
    ),
    (
        90,
        &[
            "{Paltitle} saw it too. ~[I will help you|Wait for me|Run to the left]!~ {phe} shouted.",
            "At the corner {he} met {pal}. ~It went to {place2},~ said {pal}.",
            "{He} fell and hurt {his} knee, but {he} got up again.",
        ],
    ),
    (
        100,
        &[
            "They found it {at2}. It was [caught in a {plant}|waiting for them|stuck near a fence].",
            "In the end it came to rest {@spot}.",
            "Some children {at2} had caught it and gave it back.",
        ],
    ),
    (
        90,
        &[
            "{hero} was tired, but {he} had to laugh.",
            "~Next time I will hold on tight,~ said {hero}.",
            "They went home together, and {his} {elder} had warm {mass} for everyone.",
            "{hero} gave {pal} a {fruit} and said thank you.",
        ],
    ),
];
