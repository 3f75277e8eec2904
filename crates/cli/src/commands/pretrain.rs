//! `espalier pretrain`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use espalier_train::session::SessionOptions;
use espalier_train::trainer::Scope;
use espalier_train::{Recipe, Run, setup};

use crate::output::Output;
use crate::recipe_flags::RecipeFlags;

/// Trains a model from random weights: the architecture of a `config.json`, a tokenizer, and text.
#[derive(Debug, Args)]
pub(crate) struct Pretrain {
    #[command(flatten)]
    flags: RecipeFlags,
    /// Go on with the run in this folder from its newest checkpoint.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["recipe", "overwrite"])]
    resume: Option<PathBuf>,
    /// Begin anew in a folder that holds a run.
    #[arg(long)]
    overwrite: bool,
    /// Run although the estimated memory is more than there is.
    #[arg(long)]
    allow_memory: bool,
}

impl Pretrain {
    pub(crate) fn run(self, out: Output) -> Result<()> {
        let resume = self.resume.is_some();
        let recipe = match self.resume {
            Some(folder) => {
                let mut flags = self.flags;
                flags.file = Some(folder.join("recipe.toml"));
                Recipe { out: folder.display().to_string(), ..flags.recipe()? }
            }
            None => self.flags.recipe()?,
        };
        let model = setup::new_model(&recipe)?;
        let options = SessionOptions {
            scope: Scope::WholeModel,
            resume,
            overwrite: self.overwrite,
            allow_memory: self.allow_memory,
            command: super::train::command_line(),
        };
        super::train::execute(out, Run::prepare_whole(recipe, model)?, &options)
    }
}
