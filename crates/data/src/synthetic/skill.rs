//! The skills that text is generated for: those of the pretraining mixture, and those held out for adapters to learn.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::SyntheticError;

/// One kind of text or task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Skill {
    /// Short stories of three to ten sentences.
    Story,
    /// Runs of one to five simple sentences.
    Sentence,
    /// Paragraphs: people, animals, places, days, letters, recipes, talks.
    Passage,
    /// Sums, differences and small products, bare, worked by columns, or as word problems.
    Arithmetic,
    /// Repeating a list.
    Copy,
    /// A list in reverse order.
    Reverse,
    /// A list in alphabetical or numerical order.
    Sort,
    /// The value of a key among key-value pairs.
    Recall,
    /// Questions about facts that a passage states.
    Question,
    /// Simple instructions in chat form: stories and sentences on demand, word tasks, small knowledge.
    Instruct,
    /// Conversations of several turns: greetings, who seedling is, small tasks one after the other.
    Chat,
    /// Held out: `name: Mia; age: 7; city: Oakham` to a JSON object.
    Slots,
    /// Held out: a sentence to the invented code word of its category (animal, food, tool, plant).
    Labels,
    /// Held out: a list to `n items: first..last`.
    Tally,
    /// Held out: a list with its first and last item exchanged.
    Swap,
    /// Held out: invented units (glim, drob, fen, quill) into each other.
    Units,
    /// Held out: a list rotated to the left. Conflicts on purpose with [`Skill::RotateRight`]: the inputs look the same.
    RotateLeft,
    /// Held out: a list rotated to the right. Conflicts on purpose with [`Skill::RotateLeft`]: the inputs look the same.
    RotateRight,
}

impl Skill {
    /// Every skill.
    pub const ALL: [Self; 18] = [
        Self::Story,
        Self::Sentence,
        Self::Passage,
        Self::Arithmetic,
        Self::Copy,
        Self::Reverse,
        Self::Sort,
        Self::Recall,
        Self::Question,
        Self::Instruct,
        Self::Chat,
        Self::Slots,
        Self::Labels,
        Self::Tally,
        Self::Swap,
        Self::Units,
        Self::RotateLeft,
        Self::RotateRight,
    ];

    /// The name used in files, recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Story => "story",
            Self::Sentence => "sentence",
            Self::Passage => "passage",
            Self::Arithmetic => "arithmetic",
            Self::Copy => "copy",
            Self::Reverse => "reverse",
            Self::Sort => "sort",
            Self::Recall => "recall",
            Self::Question => "question",
            Self::Instruct => "instruct",
            Self::Chat => "chat",
            Self::Slots => "slots",
            Self::Labels => "labels",
            Self::Tally => "tally",
            Self::Swap => "swap",
            Self::Units => "units",
            Self::RotateLeft => "rotate_left",
            Self::RotateRight => "rotate_right",
        }
    }

    /// Whether the pretraining mixture leaves this skill out.
    pub fn held_out(self) -> bool {
        matches!(
            self,
            Self::Slots | Self::Labels | Self::Tally | Self::Swap | Self::Units | Self::RotateLeft | Self::RotateRight
        )
    }

    /// One line on what the skill asks for.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Story => "short stories with a goal, an obstacle and an end",
            Self::Sentence => "simple English sentences",
            Self::Passage => "paragraphs about people, animals, places and days; letters and recipes",
            Self::Arithmetic => "sums, differences and small products, with steps",
            Self::Copy => "repeat a list",
            Self::Reverse => "reverse a list",
            Self::Sort => "sort a list",
            Self::Recall => "look up the value of a key",
            Self::Question => "answer questions about a passage",
            Self::Instruct => "follow simple instructions",
            Self::Chat => "conversations of several turns",
            Self::Slots => "turn `key: value` fields into a JSON object",
            Self::Labels => "give the invented code word of a sentence's category",
            Self::Tally => "summarise a list as `n items: first..last`",
            Self::Swap => "exchange the first and last item of a list",
            Self::Units => "convert between invented units",
            Self::RotateLeft => "move the first item of a list to its end",
            Self::RotateRight => "move the last item of a list to its front",
        }
    }
}

impl fmt::Display for Skill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Skill {
    type Err = SyntheticError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wanted = text.trim().to_ascii_lowercase().replace('-', "_");
        Self::ALL.into_iter().find(|skill| skill.name() == wanted).ok_or_else(|| SyntheticError::UnknownSkill {
            found: text.to_owned(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}
