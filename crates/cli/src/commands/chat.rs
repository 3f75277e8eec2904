//! `espalier chat`.

use std::io::BufRead;

use anyhow::Result;
use clap::Args;
use espalier_data::Message;
use espalier_infer::{ChatSession, end_ids};

use super::generate::SamplingArgs;
use super::model_args::ModelArgs;
use crate::output::{self, Output};

/// Talks with a model: one line is one message. /undo takes the last exchange back, /clear forgets all, /quit ends.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What the system message says.
    #[arg(long)]
    system: Option<String>,
}

impl Chat {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let loaded = self.model.load(out)?;
        let options = self.sampling.options(end_ids(&loaded.model, &loaded.codec));
        let mut session = ChatSession::new(self.system.map(|s| Message::new("system", s)).into_iter().collect());
        out.message("one line is one message; /undo, /clear, /quit");
        for line in std::io::stdin().lock().lines() {
            let line = line?;
            match line.trim() {
                "" => continue,
                "/quit" | "/exit" => break,
                "/clear" => session.clear(),
                "/undo" => out.message(if session.undo() { "taken back" } else { "nothing to take back" }),
                text => {
                    let mut failure = None;
                    let reply = session.say(&loaded.model, &loaded.codec, text, &options, &mut |piece| {
                        if !out.is_json() && failure.is_none() {
                            failure = output::piece(piece).err();
                        }
                    })?;
                    if let Some(error) = failure {
                        return Err(error);
                    }
                    match out.is_json() {
                        true => output::line(&serde_json::to_string(&reply.completion)?)?,
                        false => output::piece("\n")?,
                    }
                }
            }
        }
        Ok(())
    }
}
