//! Plots about a goal and the work towards it: baking, building, growing, saving, learning, racing.

use super::Plot;

/// The plots of this file.
pub(crate) const PLOTS: &[Plot] = &[BAKING, BUILDING, GROWING, SAVING, LEARNING, RACE, REPAIR];

const BAKING: Plot = &[
    (
        100,
        &[
            "It was {his} {elder}'s birthday, and {hero} wanted to bake a cake with {fruits}.",
            "On {day}, {hero} wanted to make a big pot of soup for {his} {elder}.",
            "{hero} wanted to bake the best {fruit} pie in {town}.",
        ],
    ),
    (
        100,
        &[
            "But there was [no sugar|no flour|no butter|no salt] in the {@room}.",
            "But {he} [forgot to watch the oven|used salt and not sugar|dropped the bowl], and everything went wrong.",
            "{He} mixed everything in a {colour} bowl. Then a {animal} came in and ate half of it.",
        ],
    ),
    (
        80,
        &[
            "~Oh no!~ said {hero}. ~What should I do now?~",
            "{hero} looked at the mess and sighed.",
            "{He} was close to tears.",
        ],
    ),
    (
        100,
        &[
            "{pal} knocked at the door. ~I have [sugar and flour|some {mass}|time],~ {phe} said. ~Let us try again.~",
            "{He} went to the {@job} next door and asked for help.",
            "{He} walked to the market and bought what {he} needed for {num} coins.",
        ],
    ),
    (
        100,
        &[
            "This time it worked. The whole house smelled [sweet|of {fruits}|wonderful].",
            "They [stirred|worked] carefully and waited. When they opened the oven, it was [golden|perfect].",
            "An hour later it was ready, and it was even better than before.",
        ],
    ),
    (
        85,
        &[
            "~This is the best thing I have ever eaten,~ said {his} {elder}.",
            "{His} {elder} took a bite and smiled from ear to ear.",
            "They ate it all, down to the last crumb.",
        ],
    ),
];

const BUILDING: Plot = &[
    (
        100,
        &[
            "{hero} wanted to build a [boat|tree house|little house|bridge|cart] of wood.",
            "One spring {hero} decided to build a [boat|cart|tower|new fence].",
            "{hero} dreamed of [a house in a tree|a boat of {his} own|a bridge over the stream].",
        ],
    ),
    (
        90,
        &[
            "{He} took a {tool} and a {@tool} and [worked all day|began to work].",
            "{He} found old boards {at} and carried them home.",
            "{He} drew a plan on a piece of paper.",
        ],
    ),
    (
        100,
        &[
            "But in the night the wind [blew it down|broke it into pieces].",
            "But when {he} [stepped on it|tried it], it fell apart.",
            "But one board was too short and the other was too long.",
        ],
    ),
    (
        85,
        &[
            "~I cannot do it,~ said {hero}. ~Yes, you can,~ said {pal}. ~[Make it stronger|Measure first, then cut|Try it another way].~",
            "{hero} was angry and threw the {tool} away. Then {he} picked it up again.",
            "{His} {elder} said, ~Everyone fails the first time.~",
        ],
    ),
    (
        100,
        &[
            "So {he} started again, [slowly and carefully|with thicker wood|with {pal} beside {him}].",
            "They [worked for {num} days|used more rope and better nails], and this time it held.",
            "{He} measured everything twice, and {pal} held the boards.",
        ],
    ),
    (
        100,
        &[
            "When it was finished, they painted it {colour} and {colour2}.",
            "At last it was done, and it was strong enough for both of them.",
            "It was not perfect, but {hero} was very proud.",
        ],
    ),
];

const GROWING: Plot = &[
    (
        100,
        &[
            "{hero} found a seed {at} and planted it [behind the house|in a {colour} pot].",
            "{His} {elder} gave {hero} a little seed. ~It needs time,~ {ehe} said.",
            "In {@month}, {hero} planted a little {plant} near the gate.",
        ],
    ),
    (
        100,
        &[
            "Every [morning|day|evening] {he} gave it water and looked at it. Nothing happened.",
            "After {num} days there was still nothing to see.",
            "{He} watered it, {he} talked to it, but it did not grow.",
        ],
    ),
    (
        80,
        &[
            "~It is dead,~ said {hero}. ~No,~ said {pal}, ~it is only [sleeping|slow]. Wait a little longer.~",
            "{hero} wanted to dig it up, but {his} {elder} stopped {him}.",
            "Then a {animal} came and [sat on it|wanted to eat it], and {hero} built a small fence.",
        ],
    ),
    (
        100,
        &[
            "Then one [warm|bright|quiet] morning {he} saw a tiny green leaf.",
            "After a night of rain, something green was there.",
            "In the spring it began to grow, and it did not stop.",
        ],
    ),
    (
        100,
        &[
            "Soon it was taller than {hero} and full of {colour} flowers.",
            "In summer it had {num} {colour} flowers, and bees came from everywhere.",
            "It grew and grew until it reached the window.",
        ],
    ),
    (
        75,
        &[
            "~Good things take time,~ said {his} {elder}.",
            "{hero} gave the first flower to {pal}.",
            "{hero} learned to be patient.",
        ],
    ),
];

const SAVING: Plot = &[
    (
        100,
        &[
            "In a shop in {town} there was a {colour} {thing}. {hero} wanted it very much.",
            "{hero} wanted to give {his} {elder} a {colour} {thing}, but it was too expensive.",
            "{hero} saw a beautiful {thing} at the market. It cost {num} coins, and {he} had only one.",
        ],
    ),
    (
        100,
        &[
            "So {he} began to work. {He} [carried water|swept the {@room}|picked {fruits}|fed the {animal}] for the {worker}.",
            "{He} asked the {worker} for work, and the {worker} gave {him} a {tool}.",
            "{He} sold {fruits} {at}, one by one.",
        ],
    ),
    (
        80,
        &[
            "Every evening {he} counted {his} coins. {He} still needed more.",
            "It was hard work, and {his} hands hurt.",
            "After {num} weeks {he} had almost enough.",
        ],
    ),
    (
        100,
        &[
            "On the way to the shop {he} met {pal}, who was crying. {Phe} [had lost {phis} money|was hungry|needed medicine for {phis} {animal}].",
            "But when {he} came back to the shop, the {thing} was gone.",
            "At last {he} ran to the shop with all {his} coins in a bag.",
        ],
    ),
    (
        100,
        &[
            "The shopkeeper had seen everything. ~You have worked hard,~ he said. ~The {thing} is yours.~",
            "But the {worker} had kept the {thing} for {him}. ~I knew you would come,~ said the {worker}.",
            "{hero} gave half of the coins to {pal}. And the shopkeeper took the other half for the {thing}.",
        ],
    ),
    (
        80,
        &[
            "{hero} was [happier than ever|proud of the {thing}], because {he} had earned it {himself}.",
            "{His} {elder} put the {thing} {@spot}, where everyone could see it.",
            "{He} carried the {thing} home in both hands.",
        ],
    ),
];

const LEARNING: Plot = &[
    (
        100,
        &[
            "{hero} wanted to learn to [swim|play the flute|play the violin|ride|dance|whistle|read|skate].",
            "All {his} friends could [swim|ride|dance|skate|whistle], but {hero} could not.",
            "{hero} heard {pal} play the [drum|harp|fiddle|trumpet] and wanted to play it too.",
        ],
    ),
    (
        100,
        &[
            "The first time {he} tried, it went very badly. [Everyone laughed.|The {animal} ran away.|{He} wanted to give up.]",
            "{He} tried once, {he} tried twice, but it did not work.",
            "~It is too hard,~ said {hero}.",
        ],
    ),
    (
        100,
        &[
            "~I will teach you,~ said {pal}. ~[A little every day|Do it slowly|Do not be afraid of mistakes].~",
            "{His} {elder} said, ~When I was young, I had to learn it too. [Do not give up|Practice makes you better].~",
            "An old {@job} saw {him} and said, ~Come to me every {day}.~",
        ],
    ),
    (
        90,
        &[
            "So {hero} practiced {at}, where nobody could [hear|see] {him}.",
            "Every day after lunch {he} practiced for an hour.",
            "{He} made many mistakes, but every day there were fewer.",
        ],
    ),
    (
        100,
        &[
            "After {num} weeks {he} could do it[ almost|] without help.",
            "One day it was suddenly easy.",
            "On {@day} {he} showed it to {his} {elder}, and {ehe} clapped {ehis} hands.",
        ],
    ),
    (
        70,
        &[
            "~I did it!~ shouted {hero}.",
            "Now {hero} teaches others who think that it is too hard.",
            "{hero} thanked {pal} with a {colour} {thing}.",
        ],
    ),
];

const RACE: Plot = &[
    (
        100,
        &[
            "Every year there was a race from {place} to {place2}. {hero} and {pal} both wanted to win.",
            "~I am faster than you,~ said {pal}. ~We will see,~ said {hero}. So they agreed to race to {place2}.",
            "The prize of the great race was a {colour} {thing}. {hero} and {pal} wanted to win it.",
        ],
    ),
    (
        80,
        &[
            "{He} [ran up and down the hill|practiced every morning] for {num} days.",
            "Everyone in {town} came to watch.",
            "~One, two, three, go!~ called the {worker}.",
        ],
    ),
    (
        100,
        &[
            "At first {pal} was in front. {hero} was close behind.",
            "{hero} was first, and {pal} was far behind.",
            "They ran side by side, past the {plant} and over the bridge.",
        ],
    ),
    (
        100,
        &[
            "Then {pal} [fell over a stone|hurt {phis} foot|fell into the mud]. {hero} stopped. ~Are you all right?~ {he} asked. They came to the end together, arm in arm, and everyone cheered.",
            "Then {hero} saw a small {animal} in the middle of the road. {He} stopped and carried it to the side. {pal} won, but the people cheered for {hero}.",
            "But {pal} was so sure of winning that {phe} sat down to eat a {fruit}. {hero} kept on running and came in first.",
            "Then {hero} slipped and fell. {pal} came back and helped {him} up, and they walked to the end side by side.",
        ],
    ),
    (
        80,
        &[
            "~You are a good friend,~ said {pal}.",
            "The {worker} gave both of them a prize.",
            "~It was a good race,~ said {hero}, and {pal} nodded.",
        ],
    ),
];

const REPAIR: Plot = &[
    (
        100,
        &[
            "One morning the big clock {at} stopped. Nobody knew what time it was.",
            "{hero}'s [cart|bike|wagon|sled] had a broken wheel, and the market was far away.",
            "The roof of {his} {elder}'s house had a hole, and the rain came in.",
            "On {day}, the pump in the garden stopped working, and the {plant} was dry.",
        ],
    ),
    (
        100,
        &[
            "{hero} looked at it from all sides. ~I think I can fix it,~ {he} said.",
            "The {worker} said that it would cost {num} coins. {hero} did not have so much.",
            "{He} asked {pal} for help, because {pal} was good with a {tool}.",
        ],
    ),
    (
        90,
        &[
            "{He} took a {tool}, but it was too [big|small|weak].",
            "{He} worked until noon, but it was still broken.",
            "Inside {he} found [a nest|a small stone|an old coin|a sleeping {animal}].",
        ],
    ),
    (
        100,
        &[
            "Then {he} saw it: one little [screw|piece|pin] was missing. {He} used a [button|nail|ring] in its place.",
            "{pal} had an idea. ~Let us use [a piece of your {thing}|some rope|an old board],~ {phe} said.",
            "{He} cleaned it, oiled it, and tried again.",
        ],
    ),
    (
        100,
        &[
            "And it worked!",
            "With a [click|crack|soft sound] everything was as good as new.",
            "It was not pretty, but it worked.",
        ],
    ),
    (
        80,
        &[
            "~Where did you learn that?~ asked {his} {elder}. ~I just looked very carefully,~ said {hero}.",
            "After that, people came to {hero} with everything that was broken.",
            "{pal} laughed and gave {him} a {fruit}.",
        ],
    ),
];
