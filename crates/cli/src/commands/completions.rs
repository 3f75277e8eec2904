//! `espalier completions`.

use anyhow::Result;
use clap::{Args, ValueEnum};
use clap_complete::Shell;

/// Prints a completion script for a shell, or the manual page.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// bash, zsh, fish, elvish, powershell; or man.
    what: String,
}

impl Completions {
    pub(crate) fn run(self, mut command: clap::Command) -> Result<()> {
        let mut text = Vec::new();
        if self.what == "man" {
            clap_mangen::Man::new(command.clone()).render(&mut text)?;
            command.build();
            for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
                clap_mangen::Man::new(sub.clone()).render(&mut text)?;
            }
        } else {
            let shell = Shell::from_str(&self.what, true)
                .map_err(|_| anyhow::anyhow!("`{}` is not bash, zsh, fish, elvish, powershell or man", self.what))?;
            clap_complete::generate(shell, &mut command, "espalier", &mut text);
        }
        crate::output::line(&String::from_utf8(text)?)
    }
}
