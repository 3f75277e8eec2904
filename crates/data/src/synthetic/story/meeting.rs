//! Plots between two: sharing, quarrels, strangers, gifts and riddles.

use super::Plot;

/// The plots of this file.
pub(crate) const PLOTS: &[Plot] = &[SHARING, QUARREL, NEWCOMER, RIDDLE, GIFT, PICNIC, SWAP_DEALS, NEW_PET];

const SHARING: Plot = &[
    (
        100,
        &[
            "{hero} had one last {fruit} in {his} bag. {He} was very hungry.",
            "On the way to {place}, {hero} sat down to eat {his} {mass}.",
            "It was a cold winter, and {hero} had only a little {mass} left.",
        ],
    ),
    (
        100,
        &[
            "Then a [thin|tired|hungry] {animal} came and looked at {him} with big eyes.",
            "Then {paltitle} came by. ~I have not eaten since {@day},~ {phe} said.",
            "An old {@job} stopped in front of {him}. ~May I have a little?~ he asked.",
        ],
    ),
    (
        80,
        &[
            "{hero} thought about it. There was not much.",
            "~If I give it away, I will be hungry,~ {he} thought.",
            "First {hero} wanted to say no.",
        ],
    ),
    (
        100,
        &[
            "But then {he} broke it in two and gave away [half|the bigger half].",
            "~Come and sit with me,~ said {hero}. ~We will share.~",
            "~Take it,~ said {hero}. ~You need it more than I do.~",
        ],
    ),
    (
        100,
        &[
            "The next day there was a basket full of {@fruit+s} at {his} door.",
            "{num} days later, when {hero} [was lost {at2}|fell into the river|needed help], {his} new friend came and helped {him}.",
            "They ate together and told each other stories until the sun went down.",
        ],
    ),
    (
        60,
        &[
            "~What you give comes back to you,~ said {his} {elder}.",
            "{hero} was not hungry any more. {He} was happy.",
            "It was the best {mass} {he} ever had.",
        ],
    ),
];

const QUARREL: Plot = &[
    (
        100,
        &[
            "{hero} and {pal} were best friends. But one day they both wanted the same {colour} {thing}. ~It is mine!~ said {hero}. ~No, it is mine!~ said {pal}.",
            "{hero} and {pal} did everything together, until {pal} [broke|lost] {hero}'s {thing}.",
            "One {day}, {hero} and {pal} played a game. ~You did not play fair!~ shouted {hero}.",
        ],
    ),
    (
        100,
        &[
            "~You are not my friend any more!~ said {hero}.",
            "They shouted at each other, and {pal} ran home.",
            "~I will never talk to you again,~ said {pal}.",
        ],
    ),
    (
        100,
        &[
            "The next day {hero} was alone {at}. It was [boring|very quiet|no fun] without {pal}.",
            "For {num} days they did not speak. Both of them were sad.",
            "{hero} tried to play alone, but it was not the same.",
        ],
    ),
    (
        80,
        &[
            "~What is more important,~ asked {his} {elder}, ~to be right or to have a friend?~",
            "{His} {elder} said, ~Somebody has to be the first to say sorry.~",
            "At night {he} could not sleep.",
        ],
    ),
    (
        100,
        &[
            "So {hero} went to {pal}'s house. At the same moment {pal} opened the door. ~I am sorry,~ they both said.",
            "{hero} wrote a letter: ~I am sorry. Please come back.~",
            "In the morning {he} took a {fruit} and went to {pal}. ~I was wrong,~ {he} said.",
        ],
    ),
    (
        90,
        &[
            "After that they shared everything, even the last piece of cake.",
            "They laughed and went to {place2} together.",
            "~Friends?~ asked {pal}. ~Friends,~ said {hero}.",
        ],
    ),
];

const NEWCOMER: Plot = &[
    (
        100,
        &[
            "One day a new {palkind} named {pal} came to {town}. {pal} did not know anyone.",
            "{Paltitle} was new {at} and always sat alone.",
            "In {@month}, {paltitle} moved into the {colour} house next to {hero}.",
        ],
    ),
    (
        100,
        &[
            "{hero} wanted to say hello, but {he} did not know how.",
            "The others [did not talk to|laughed at|walked past] {pal}, because {phe} wore a strange {@clothes}.",
            "~Why does nobody talk to {phim}?~ {hero} asked {his} {elder}.",
        ],
    ),
    (
        100,
        &[
            "So {he} took {his} {thing} and went over. ~Do you want to play?~ {he} asked.",
            "Then {he} saw that {pal} had a {thing}. ~I have one too,~ said {hero}.",
            "~Would you like [a {fruit}|some {mass}]?~ asked {hero}.",
        ],
    ),
    (
        100,
        &[
            "{pal} smiled for the first time. ~Yes, please,~ {phe} said.",
            "At first {pal} was quiet. Then {phe} began to talk about {phis} old home by the sea.",
            "{pal} nodded, and soon they were both laughing.",
        ],
    ),
    (
        90,
        &[
            "{pal} knew many songs and games, and soon everyone wanted to be {phis} friend.",
            "They found out that they both liked {mass} and {@animal+s}.",
            "{pal} showed {hero} how to make a {@thing} of paper.",
        ],
    ),
    (
        60,
        &[
            "~I am glad that I asked,~ said {hero}.",
            "Now there were two of them, and two is better than one.",
            "It only takes one kind word to make a friend.",
        ],
    ),
];

const RIDDLE: Plot = &[
    (
        100,
        &[
            "One day {hero} came to an old gate near {place}. In front of it sat a {animal}. ~You may pass if you answer my question,~ it said.",
            "{at}, {hero} met a very old {animal} with a {colour} {thing}. ~Answer my riddle, and it is yours,~ it said.",
            "The {@job} of {town} promised a {colour} {thing} to the one who could solve his riddle.",
        ],
    ),
    (
        100,
        &[
            "~What has hands but cannot clap?~ {hero} thought for a long time. ~A clock!~ {he} said.",
            "~What gets wet while it dries?~ {hero} looked at {his} hands. ~A towel!~ {he} said.",
            "~What has a neck but no head?~ {hero} walked up and down. ~A bottle!~ {he} said.",
            "~What goes up but never comes down?~ {hero} smiled. ~My age!~ {he} said.",
            "~What is full of holes but still holds water?~ {hero} laughed. ~A sponge!~ {he} said.",
            "~What has teeth but cannot bite?~ {hero} thought of {his} hair. ~A comb!~ {he} said.",
            "~What can you hear but never see?~ {hero} listened. ~The wind!~ {he} said.",
        ],
    ),
    (
        100,
        &[
            "~That is right,~ was the answer. ~Nobody has known it for {num} years.~",
            "It was right. Everyone was surprised that a {kind} was so clever.",
            "For a moment it was quiet. ~Very good,~ said the voice. ~You are clever.~",
        ],
    ),
    (
        90,
        &[
            "So {hero} [got the {thing}|took the {thing} and ran home|went on with a light heart].",
            "{hero} said thank you and went to tell {pal} about it.",
            "{hero} was allowed to ask a riddle too, and nobody could answer it.",
        ],
    ),
    (
        50,
        &[
            "~How did you know?~ asked {pal}. ~I thought about simple things,~ said {hero}.",
            "Since then, {hero} collects riddles like other people collect {@thing+s}.",
        ],
    ),
];

const GIFT: Plot = &[
    (
        100,
        &[
            "It was almost {pal}'s birthday, and {hero} had no gift.",
            "{hero} wanted to give {pal} something special, but {he} had no money.",
            "{pal} was ill and had to stay in bed. {hero} wanted to make {phim} happy.",
        ],
    ),
    (
        90,
        &[
            "{He} looked in the shops of {town}, but everything was too expensive.",
            "~What does {phe} like?~ {he} asked {his} {elder}. ~{pal} likes everything that is {colour},~ said {his} {elder}.",
            "{He} thought about a {thing}, and about a {thing2}, but nothing was right.",
        ],
    ),
    (
        100,
        &[
            "So {he} went to {place} and picked {num} {colour} flowers.",
            "Then {he} found a smooth {colour} stone and painted a {animal} on it.",
            "So {he} sat down and wrote a poem about {pal} and the {animal}.",
            "Then {he} took wood and a knife and made a little {animal}.",
        ],
    ),
    (
        80,
        &[
            "~Is it good enough?~ {he} thought on the way.",
            "{He} wrapped it in {colour2} paper.",
            "{His} heart was beating fast when {he} knocked at the door.",
        ],
    ),
    (
        100,
        &[
            "{pal} opened it and [was silent for a moment|began to smile]. ~You made it for me?~ {phe} said. ~It is the best gift of all.~",
            "{pal} was so happy that {phe} [danced around the {@room}|hugged {hero}|forgot to be ill].",
            "{pal} put it {@spot}, and it is still there today.",
        ],
    ),
];

const PICNIC: Plot = &[
    (
        100,
        &[
            "On {day}, {hero} and {pal} wanted to have a picnic {at}.",
            "{hero} planned a trip to {place} with {pal} and packed {mass} and {num} {fruits}.",
            "It was the first warm day of {@month}. ~Let us go to {place}!~ said {hero}.",
        ],
    ),
    (
        100,
        &[
            "But when they arrived, it began to rain.",
            "But a {animal} [ran away with the basket|ate all the {fruits}].",
            "But the road was closed, and they could not go on.",
            "But {pal} had forgotten the basket at home.",
        ],
    ),
    (
        80,
        &[
            "~Our day is ruined,~ said {pal}.",
            "They looked at each other and did not know what to do.",
            "{hero} was angry for a moment.",
        ],
    ),
    (
        100,
        &[
            "~I have an idea,~ said {hero}. They [sat under a bridge|made a tent of a blanket|ran to the old barn] and told stories.",
            "So they went to {place2} and looked for berries.",
            "Then they met {pal}'s {elder}, who had bread and cheese for everyone.",
        ],
    ),
    (
        100,
        &[
            "In the end it was more fun than any picnic.",
            "They laughed until their bellies hurt.",
            "When the sun came out again, nobody wanted to go home.",
        ],
    ),
];

const SWAP_DEALS: Plot = &[
    (
        100,
        &[
            "{hero} went to the market with a {thing}. {He} wanted to come home with something better.",
            "One {day}, {his} {elder} gave {hero} a {thing} and said, ~Bring me something useful for it.~",
        ],
    ),
    (
        100,
        &[
            "First {he} met a {@job}, who gave {him} a {tool} for it.",
            "First {he} met {pal}. ~I will give you a {thing2} for it,~ said {pal}.",
        ],
    ),
    (
        100,
        &[
            "Then {he} gave that away for a {animal}.",
            "Then {he} met an old woman who needed just that. She gave {him} a basket of {fruits}.",
            "Then a boy gave {him} a {@colour} {@clothes} for it.",
        ],
    ),
    (
        100,
        &[
            "On the way home {he} saw {pal}, who was cold and hungry. So {he} gave everything away.",
            "But on the way home it began to rain, and {he} had to wait {at2}.",
            "Just before {town}, {he} met a sad {@job}. {hero} gave everything away and got only a small {colour} seed.",
        ],
    ),
    (
        100,
        &[
            "{He} came home with empty hands. ~You brought me a good heart,~ said {his} {elder}. ~That is useful enough.~",
            "{His} {elder} laughed. ~You had a good day,~ {ehe} said. ~That is the best deal.~",
        ],
    ),
];

const NEW_PET: Plot = &[
    (
        100,
        &[
            "One rainy evening, {hero} found a little {animal} {@spot}.",
            "On the way home from {place}, {hero} heard a soft cry. It was a small {animal}, all alone.",
            "{hero} wished for a {animal} more than for anything else. On {day}, one sat in front of the door.",
        ],
    ),
    (
        100,
        &[
            "It was wet and cold, so {he} took it home in {his} {@clothes}.",
            "{He} gave it {@drink} and some {mass}, and it fell asleep in {his} arms.",
            "~You can stay with me,~ said {hero}. {He} called it {petname}.",
        ],
    ),
    (
        100,
        &[
            "But {his} {elder} said, ~It belongs to somebody. We have to look for its home.~",
            "But the next day there was a note {at}: ~Lost: one small {animal}.~",
            "But soon the {animal} was sad and always looked out of the window.",
        ],
    ),
    (
        100,
        &[
            "{hero} was sad, but {he} knew that it was right. {He} carried the {animal} to {pal}, who had been looking for it for {num} days.",
            "Together with {his} {elder}, {he} asked everyone in {town}. At last they found its owner, {paltitle}.",
            "So {hero} took it back to {place}. There its mother was waiting.",
        ],
    ),
    (
        90,
        &[
            "~You may visit it every day,~ said {pal}.",
            "{num} weeks later, {pal} came with a box. In it was a very young {animal}. ~This one is for you,~ {phe} said.",
            "It looked back once, as if it wanted to say thank you.",
        ],
    ),
];
