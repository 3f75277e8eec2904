//! Plots about being afraid, and what is done all the same: storms, noises at night, a stage, an old fear.

use super::Plot;

/// The plots of this file.
pub(crate) const PLOTS: &[Plot] = &[STORM, NIGHT_NOISE, SHOW, FEAR];

const SHOW: Plot = &[
    (
        100,
        &[
            "The people of {town} were planning a big show, and {hero} was asked to [sing|play the flute|tell a story|dance].",
            "On {day} there was a fair {at}. {hero} wanted to show everyone {his} {colour} {thing}.",
            "{His} school had a show every {@month}, and this year {hero} had to speak in front of everyone.",
        ],
    ),
    (
        100,
        &[
            "{He} was so nervous that {his} knees shook.",
            "When {he} saw all the people, {he} forgot every word.",
            "~What if I make a mistake?~ {he} asked {pal}.",
        ],
    ),
    (
        90,
        &[
            "~Look only at me,~ said {pal}. ~The others are not there.~",
            "{His} {elder} took {his} hand and said, ~Take a deep breath.~",
            "{pal} gave {him} a {thing2} for good luck.",
        ],
    ),
    (
        100,
        &[
            "{hero} closed {his} eyes, counted to {num}, and began.",
            "At first {his} voice was small. Then it became stronger and stronger.",
            "{He} thought of {place}, and {he} was calm.",
        ],
    ),
    (
        100,
        &[
            "When it was over, everyone stood up and clapped.",
            "It was very quiet for a moment. Then the whole room cheered.",
            "There was one small mistake, but nobody minded.",
        ],
    ),
    (
        60,
        &[
            "~When can I do it again?~ asked {hero}.",
            "{His} {elder} had tears in {ehis} eyes.",
            "{hero} bowed and ran to {pal}.",
        ],
    ),
];

const STORM: Plot = &[
    (
        100,
        &[
            "One evening a great storm came over {town}. The wind [shook|hit] the windows.",
            "It rained for {num} days, and the water near {place} rose higher and higher.",
            "On {day} night, the sky turned black and the thunder began.",
        ],
    ),
    (
        100,
        &[
            "{hero} was afraid of the thunder. {He} hid {@spot}.",
            "{hero} heard that {pal} was still out {at2}.",
            "{hero} could not sleep. ~Is the {animal} safe in the barn?~ {he} asked.",
        ],
    ),
    (
        100,
        &[
            "{He} took a lantern and a coat and went out into the rain.",
            "~I must be brave,~ {he} said to {himself}, and {he} opened the door.",
            "{His} {elder} said, ~Count after the light. If you can count to ten, the storm is far away.~",
        ],
    ),
    (
        90,
        &[
            "{He} counted: one, two, three, four, five. The next time {he} came to eight. The storm was moving away.",
            "The wind was so strong that {he} had to hold on to the fence.",
            "{He} found {pal} under a big {plant}, wet and cold. ~Come with me,~ said {hero}.",
        ],
    ),
    (
        100,
        &[
            "In the morning the sun was shining and everything was [quiet|clean|green] again.",
            "At last the rain stopped, and the first stars came out.",
            "When it was over, they sat by the fire and drank hot [tea|cocoa|milk].",
        ],
    ),
    (
        70,
        &[
            "{hero} was not afraid of storms any more.",
            "~You were very brave,~ said {his} {elder}.",
            "There was a rainbow over {place}.",
        ],
    ),
];

const NIGHT_NOISE: Plot = &[
    (
        100,
        &[
            "One night {hero} woke up. There was a [strange|soft|scratching] noise in the {@room}.",
            "Late at night {hero} heard something: tap, tap, tap.",
            "{hero} was almost asleep when something fell over in the {@room}.",
        ],
    ),
    (
        90,
        &[
            "~Is it a [ghost|thief|monster]?~ {he} thought, and pulled the blanket over {his} head.",
            "{He} lay very still and listened. There it was again!",
            "{He} wanted to call {his} {elder}, but no sound came out.",
        ],
    ),
    (
        100,
        &[
            "Then {he} took a [candle|lamp|lantern] and went to look, step by step.",
            "~I want to know what it is,~ said {hero}, and {he} got up.",
            "{He} woke {his} {elder}, and they went to look together.",
        ],
    ),
    (
        100,
        &[
            "Behind the door sat a little {animal}. It was [eating the {mass}|looking for a warm place|playing with a {thing}].",
            "It was only [the wind in the curtain|a branch at the window|the old clock|rain on the roof].",
            "It was {pal}! ~I am sorry,~ said {pal}. ~I was hungry and wanted a {fruit}.~",
        ],
    ),
    (
        85,
        &[
            "{hero} laughed and went back to bed.",
            "~So you are the ghost,~ said {hero} and laughed.",
            "After that, {hero} was never afraid of noises in the night.",
        ],
    ),
];

const FEAR: Plot = &[
    (
        100,
        &[
            "{hero} was afraid of [deep water|the dark|high places|big dogs|the old tower].",
            "There was only one thing that {hero} was afraid of: [the dark|deep water|loud noises].",
        ],
    ),
    (
        100,
        &[
            "When the others went to {place}, {he} always stayed at home.",
            "{He} told nobody, not even {pal}.",
            "~Come with us,~ {pal} often said. But {hero} always shook {his} head.",
        ],
    ),
    (
        100,
        &[
            "One evening {pal} [did not come home|called for help from the cellar|fell into the lake]. There was no time to think.",
            "Then {his} {elder} lost a {thing} {at}, and only {hero} was small enough to get it.",
            "One day {his} little {animal} ran into the dark barn and did not come out.",
        ],
    ),
    (
        100,
        &[
            "{hero} was shaking, but {he} went, one step after another.",
            "~I am afraid, but I can still do it,~ {he} said.",
            "{He} took a deep breath, closed {his} eyes, and [jumped|went in].",
        ],
    ),
    (
        100,
        &[
            "It was not as bad as {he} had thought. Soon {he} was back, and everyone was safe.",
            "And then it was over. ~You did it!~ everyone shouted.",
            "It took only a minute, but it felt like an hour. Then everything was fine.",
        ],
    ),
    (
        70,
        &[
            "~Were you not afraid?~ asked {pal}. ~Yes,~ said {hero}, ~but [you are my friend|I went anyway].~",
            "To be brave does not mean to have no fear.",
            "The next day {hero} went there again, just for fun.",
        ],
    ),
];
