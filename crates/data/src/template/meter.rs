//! A bound on what one rendering may build: every string and list that a template makes is counted before it is made.
//!
//! Counted are the results of operators, filters, methods and functions, what is captured and what is put out. What grew
//! without a bound in small steps (a string doubled thirty times, a list inside a list inside a list) is refused with an
//! error; the sum is far above what conversations need, and grows with the conversation.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Object, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Bytes that a template may build whatever the conversation, and for each byte of the conversation.
const BUDGET: usize = 32 << 20;
const BUDGET_PER_BYTE: usize = 64;
/// What the smallest thing counts as, and an entry of a list.
const LEAST: usize = 32;
const ENTRY: usize = 24;
/// Deepest nesting of lists and dictionaries.
const DEEPEST: usize = 100;
/// Widest padding or indentation.
const WIDEST: usize = 1000;

/// Name of the meter among the variables of a template.
pub(super) const METER: &str = "espalier_meter";
/// Filters that [`super::program`] puts behind and in front of instructions.
pub(super) const COUNT: &str = "espalier_count";
pub(super) const NEST: &str = "espalier_nest";
pub(super) const ATTRIBUTE: &str = "espalier_attribute";
pub(super) const TIMES: &str = "espalier_times";
pub(super) const SLICE: &str = "espalier_slice";

/// Filters whose result can be much larger than what they are given, or that work on the items of a list unseen.
const BUILDERS: [&str; 17] = [
    "capitalize",
    "e",
    "escape",
    "format",
    "indent",
    "items",
    "join",
    "lines",
    "list",
    "lower",
    "replace",
    "reverse",
    "split",
    "sum",
    "title",
    "trim",
    "upper",
];

/// Bytes left to build.
#[derive(Debug)]
pub(super) struct Meter(AtomicUsize);

impl Object for Meter {}

impl Meter {
    /// The meter of one rendering of a conversation of `size` bytes.
    pub(super) fn of(size: usize) -> Value {
        Value::from_object(Self(AtomicUsize::new(BUDGET.saturating_add(size.saturating_mul(BUDGET_PER_BYTE)))))
    }

    fn spend(&self, bytes: usize) -> Result<(), Error> {
        let enough = |left: usize| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough).map(|_| ()).map_err(|_| {
            let message = format!("it builds more text than {} MiB beside the conversation", BUDGET >> 20);
            Error::new(ErrorKind::InvalidOperation, message)
        })
    }

    /// Counts the text that a value gives when written out.
    fn spend_text(&self, value: &Value, depth: usize) -> Result<(), Error> {
        if let Some(text) = value.as_str() {
            return self.spend(text.len());
        }
        each(value, depth, |item| self.spend_text(item, depth + 1))?;
        self.spend(LEAST)
    }
}

fn with_meter<T>(state: &State<'_, '_>, act: impl FnOnce(&Meter) -> Result<T, Error>) -> Result<T, Error> {
    let meter = state.lookup(METER);
    match meter.as_ref().and_then(Value::downcast_object_ref::<Meter>) {
        Some(meter) => act(meter),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("{METER} is no name for a variable"))),
    }
}

/// Counts bytes that are going to be built.
pub(super) fn spend(state: &State<'_, '_>, bytes: usize) -> Result<(), Error> {
    with_meter(state, |meter| meter.spend(bytes))
}

/// Counts the text that `value` gives when written out.
pub(super) fn spend_text(state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    with_meter(state, |meter| meter.spend_text(value, 0))
}

/// Goes over what a list or dictionary holds; refuses to go too deep.
fn each(value: &Value, depth: usize, mut act: impl FnMut(&Value) -> Result<(), Error>) -> Result<(), Error> {
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    if depth > DEEPEST {
        let message = format!("lists and dictionaries are nested deeper than {DEEPEST}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    for item in value.try_iter()? {
        act(&item)?;
        if kind == ValueKind::Map {
            act(&value.get_item(&item)?)?;
        }
    }
    Ok(())
}

/// What a value holds by itself, in bytes.
pub(super) fn shallow(value: &Value) -> usize {
    match value.as_str() {
        Some(text) => text.len(),
        None => ENTRY.saturating_mul(value.len().unwrap_or(0)),
    }
}

pub(super) fn refuse(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// Counts a value, which stays what it is; a sequence that is made item by item becomes a list, so that none hides others.
fn count(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    spend(state, LEAST + shallow(&value))?;
    if value.kind() != ValueKind::Iterable {
        return Ok(value);
    }
    let mut list = Vec::new();
    for item in value.try_iter()? {
        spend(state, ENTRY)?;
        list.push(item);
    }
    Ok(Value::from(list))
}

/// Counts a new list or dictionary, and refuses it where it is nested too deep.
fn nest(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    fn look(meter: &Meter, value: &Value, depth: usize) -> Result<(), Error> {
        meter.spend(LEAST)?;
        each(value, depth, |item| look(meter, item, depth + 1))
    }
    // A range makes its numbers when they are asked for.
    if value.kind() != ValueKind::Iterable {
        with_meter(state, |meter| look(meter, &value, 0))?;
    }
    Ok(value)
}

/// Refuses to put a namespace, a macro or another live object into a namespace: it could hold itself.
fn attribute(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    fn look(value: &Value, depth: usize) -> Result<(), Error> {
        let live = value.kind() == ValueKind::Plain
            || value.as_object().is_some_and(|object| object.type_name().contains("Namespace"));
        if live {
            return Err(refuse("a namespace can hold text, numbers, lists and dictionaries, nothing else"));
        }
        each(value, depth, |item| look(item, depth + 1))
    }
    nest(state, value.clone())?;
    look(&value, 0)?;
    Ok(value)
}

/// Counts what a filter or method called `name` is about to build; `args` begins with the value it is applied to.
pub(super) fn foresee(state: &State<'_, '_>, name: &str, args: &[Value]) -> Result<(), Error> {
    let text = |at: usize| args.get(at).and_then(Value::as_str);
    let own: usize = args.iter().map(shallow).fold(0, usize::saturating_add);
    match name {
        "join" => {
            // As a filter the list comes first, as a method the joiner.
            let (list, joiner) =
                if text(0).is_some() && args.len() > 1 { (args.get(1), text(0)) } else { (args.first(), text(1)) };
            if let Some(list) = list {
                spend_text(state, list)?;
                spend(state, list.len().unwrap_or(0).saturating_mul(joiner.map_or(0, str::len)))?;
            }
            Ok(())
        }
        "sum" => args.first().map_or(Ok(()), |list| spend_text(state, list)),
        "replace" => {
            let (Some(whole), Some(old), Some(new)) = (text(0), text(1), text(2)) else { return spend(state, own) };
            let found = if old.is_empty() { whole.len() + 1 } else { whole.matches(old).count() };
            spend(state, whole.len().saturating_add(found.saturating_mul(new.len())))
        }
        "indent" => {
            let width = args.iter().skip(1).filter_map(|arg| {
                let named = arg.get_attr("width").ok().and_then(|width| width.as_usize());
                arg.as_usize().or(named)
            });
            let width = width.max().unwrap_or(4);
            if width > WIDEST {
                return Err(refuse(&format!("an indentation of {width} is more than {WIDEST}")));
            }
            let lines = text(0).map_or(0, |text| text.matches('\n').count() + 1);
            spend(state, own.saturating_add(lines.saturating_mul(width)))
        }
        "format" => {
            let pattern = text(0).unwrap_or_default();
            let longest = pattern.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
            if longest > 3 || pattern.contains('*') {
                return Err(refuse(&format!("a width in {pattern:?} is more than {WIDEST}")));
            }
            let places = pattern.matches(['%', '{']).count();
            let mut largest = WIDEST;
            for arg in args.iter().skip(1) {
                spend_text(state, arg)?;
                largest = largest.max(shallow(arg));
            }
            spend(state, pattern.len().saturating_add(places.saturating_mul(largest)))
        }
        // The longest escape of a character has six.
        "e" | "escape" => spend(state, own.saturating_mul(6)),
        _ => spend(state, own),
    }
}

/// The engine's own filters.
fn plain() -> &'static Environment<'static> {
    static PLAIN: OnceLock<Environment<'static>> = OnceLock::new();
    PLAIN.get_or_init(Environment::new)
}

/// Makes an environment count.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.add_filter(COUNT, count);
    environment.add_filter(NEST, nest);
    environment.add_filter(ATTRIBUTE, attribute);
    environment.add_filter(TIMES, super::operators::times);
    environment.add_filter(SLICE, super::operators::slice);
    for name in BUILDERS {
        environment.add_filter(name, move |state: &State<'_, '_>, args: Rest<Value>| {
            foresee(state, name, &args)?;
            plain().empty_state().apply_filter(name, &args)
        });
    }
    environment.set_unknown_method_callback(|state, value, method, args| {
        let all: Vec<Value> = std::iter::once(value.clone()).chain(args.iter().cloned()).collect();
        foresee(state, method, &all)?;
        if method == "count" && args.first().and_then(Value::as_str) == Some("") {
            // The engine looks for it without end.
            return Ok(Value::from(value.as_str().map_or(0, |text| text.chars().count() + 1)));
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    // These write out values, or make lists, of a size that is not seen beforehand.
    for name in ["pprint", "batch", "slice"] {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
}
