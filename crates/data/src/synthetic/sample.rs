//! One generated sample, and the forms that it is built in.

use serde::Serialize;

use super::skill::Skill;

/// One sample: plain text or a conversation, with a checkable answer where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// The skill that it exercises.
    pub skill: Skill,
    /// What the train/test split is decided by: the task's payload without its phrasing, or the whole text of prose.
    pub key: String,
    /// The text of a plain sample: prose, or `prompt + " " + answer`.
    pub text: Option<String>,
    /// The turns of a chat sample as (role, content); roles are `system`, `user` and `assistant`.
    pub messages: Option<Vec<(String, String)>>,
    /// What the model is given before the answer: the start of `text`, or the last user turn.
    pub prompt: Option<String>,
    /// The one right answer, without surrounding white space; absent where many answers are right.
    pub answer: Option<String>,
}

/// One exchange: a user turn and its reply.
pub(crate) struct Task {
    /// See [`Sample::key`].
    pub(crate) key: String,
    /// What the user says.
    pub(crate) user: String,
    /// What the assistant answers.
    pub(crate) reply: String,
    /// Whether the reply is the only right one.
    pub(crate) exact: bool,
}

impl Task {
    /// A task with one right answer.
    pub(crate) fn exact(key: impl Into<String>, user: impl Into<String>, reply: impl Into<String>) -> Self {
        Self { key: key.into(), user: user.into(), reply: reply.into(), exact: true }
    }

    /// A task with many right answers.
    pub(crate) fn open(user: impl Into<String>, reply: impl Into<String>) -> Self {
        let user = user.into();
        Self { key: user.clone(), user, reply: reply.into(), exact: false }
    }
}

impl Sample {
    /// Prose without a question.
    pub(crate) fn prose(skill: Skill, text: String) -> Self {
        Self { skill, key: text.clone(), text: Some(text), messages: None, prompt: None, answer: None }
    }

    /// Plain text that ends with the answer.
    pub(crate) fn plain(skill: Skill, key: String, prompt: String, answer: String) -> Self {
        let text = format!("{prompt} {answer}");
        Self { skill, key, text: Some(text), messages: None, prompt: Some(prompt), answer: Some(answer) }
    }

    /// One user turn and one reply.
    pub(crate) fn chat(skill: Skill, task: Task) -> Self {
        Self::conversation(skill, None, Vec::new(), task)
    }

    /// A conversation: perhaps a system turn, earlier exchanges, and the last exchange, which is the one that is checked.
    pub(crate) fn conversation(skill: Skill, system: Option<&str>, earlier: Vec<Task>, last: Task) -> Self {
        let mut messages: Vec<(String, String)> = Vec::with_capacity(2 * earlier.len() + 3);
        if let Some(system) = system {
            messages.push(("system".to_owned(), system.to_owned()));
        }
        let mut key = String::new();
        for task in earlier {
            key.push_str(&task.key);
            key.push('\n');
            messages.push(("user".to_owned(), task.user));
            messages.push(("assistant".to_owned(), task.reply));
        }
        key.push_str(&last.key);
        let answer = last.exact.then(|| last.reply.clone());
        messages.push(("user".to_owned(), last.user.clone()));
        messages.push(("assistant".to_owned(), last.reply));
        Self { skill, key, text: None, messages: Some(messages), prompt: Some(last.user), answer }
    }
}

/// The sample as a data row: `{"text": ..}` or `{"messages": [{"role": .., "content": ..}, ..]}`.
pub fn to_row(sample: &Sample) -> serde_json::Value {
    match &sample.messages {
        Some(messages) => {
            let turns: Vec<serde_json::Value> = messages
                .iter()
                .map(|(role, content)| serde_json::json!({ "role": role, "content": content }))
                .collect();
            serde_json::json!({ "messages": turns })
        }
        None => serde_json::json!({ "text": sample.text.as_deref().unwrap_or_default() }),
    }
}
