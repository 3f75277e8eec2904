//! Every recipe key as a flag: `max_steps` is `--max-steps`, `shuffle` is `--shuffle` and `--no-shuffle`, a key of the
//! `[adapter]` table is its own name, `method` of the `[dynamics]` table is `--dynamics`, and another key of it
//! `--dynamics-KEY`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use espalier_train::Recipe;
use espalier_train::recipe::{KEYS, Setting, adapter_keys, dynamics_keys};

/// A recipe file and the flags over it.
#[derive(Debug, Clone, Default)]
pub(crate) struct RecipeFlags {
    pub(crate) file: Option<PathBuf>,
    pub(crate) settings: Vec<Setting>,
}

impl RecipeFlags {
    /// The resolved recipe.
    pub(crate) fn recipe(&self) -> anyhow::Result<Recipe> {
        Ok(Recipe::read(self.file.as_deref(), &self.settings)?)
    }
}

fn flag(name: &str) -> String {
    name.replace('_', "-")
}

fn default_text(default: &str) -> Option<String> {
    let text = default.trim().trim_end_matches(".into()").trim_matches('"');
    let empty =
        ["None", "String::new()", "DataList::default()", "OneOrMany::default()"].contains(&text) || text.is_empty();
    (!empty).then(|| text.to_owned())
}

impl Args for RecipeFlags {
    fn augment_args(mut command: Command) -> Command {
        command = command.arg(
            Arg::new("recipe")
                .value_name("RECIPE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("Recipe file (TOML)"),
        );
        command = command.arg(
            Arg::new("set")
                .long("set")
                .value_name("KEY=VALUE")
                .action(ArgAction::Append)
                .help("Set one recipe key; `adapter.` and `dynamics.` for keys of those tables"),
        );
        for key in KEYS {
            let help = match default_text(key.default) {
                Some(default) => format!("{} [default: {default}]", key.text()),
                None => key.text(),
            };
            let arg = Arg::new(key.name).long(flag(key.name)).help(help).help_heading("Recipe keys");
            if key.kind == "bool" {
                command = command.arg(arg.action(ArgAction::SetTrue));
                let no = format!("no_{}", key.name);
                let arg = Arg::new(no.clone()).long(flag(&no)).action(ArgAction::SetTrue).hide(key.default == "false");
                let help = format!("Switch {} off", flag(key.name));
                command = command.arg(arg.conflicts_with(key.name).help(help).help_heading("Recipe keys"));
            } else {
                let many = key.kind == "DataList" || key.kind == "OneOrMany";
                let action = if many { ArgAction::Append } else { ArgAction::Set };
                command = command.arg(arg.value_name("VALUE").action(action).allow_hyphen_values(true));
            }
        }
        for key in adapter_keys() {
            let id = format!("adapter.{}", key.name);
            command = command
                .arg(Arg::new(id).long(flag(&key.name)).value_name("VALUE").help(key.doc).help_heading("Adapter keys"));
        }
        for key in dynamics_keys() {
            let long = match key.name.as_str() {
                "method" => "dynamics".to_owned(),
                name => format!("dynamics-{}", flag(name)),
            };
            let id = format!("dynamics.{}", key.name);
            let arg = Arg::new(id).long(long).value_name("VALUE").help(key.doc).help_heading("Dynamics keys");
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RecipeFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self { file: matches.get_one::<PathBuf>("recipe").cloned(), settings: Vec::new() };
        for text in matches.get_many::<String>("set").into_iter().flatten() {
            let (key, value) = text.split_once('=').ok_or_else(|| {
                clap::Error::raw(clap::error::ErrorKind::ValueValidation, format!("--set {text}: expected KEY=VALUE\n"))
            })?;
            flags.settings.push(Setting { key: key.trim().into(), text: value.into() });
        }
        for key in KEYS {
            if key.kind == "bool" {
                let on = matches.get_flag(key.name);
                if on || matches.get_flag(&format!("no_{}", key.name)) {
                    flags.settings.push(Setting { key: key.name.into(), text: on.to_string() });
                }
                continue;
            }
            let values: Vec<&String> = matches.get_many::<String>(key.name).into_iter().flatten().collect();
            let text = match values.as_slice() {
                [] => continue,
                [one] => (*one).clone(),
                many => format!(
                    "[{}]",
                    many.iter().map(|v| toml::Value::from(v.as_str()).to_string()).collect::<Vec<_>>().join(", ")
                ),
            };
            flags.settings.push(Setting { key: key.name.into(), text });
        }
        for key in adapter_keys() {
            let id = format!("adapter.{}", key.name);
            if let Some(text) = matches.get_one::<String>(&id) {
                flags.settings.push(Setting { key: id, text: list_or_text(&key.name, text) });
            }
        }
        for key in dynamics_keys() {
            let id = format!("dynamics.{}", key.name);
            if let Some(text) = matches.get_one::<String>(&id) {
                flags.settings.push(Setting { key: id, text: text.clone() });
            }
        }
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// `q_proj,v_proj` as a list, where a key takes one.
fn list_or_text(key: &str, text: &str) -> String {
    let lists = ["target_modules", "exclude_modules", "modules_to_save"];
    if !lists.contains(&key) || text.starts_with('[') || text.contains(['(', '*', '\\', '|', '^', '$']) {
        return text.to_owned();
    }
    if key != "modules_to_save" && !text.contains(',') && text == "all-linear" {
        return text.to_owned();
    }
    let items: Vec<String> = text.split(',').map(|item| toml::Value::from(item.trim()).to_string()).collect();
    format!("[{}]", items.join(", "))
}
