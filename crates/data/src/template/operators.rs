//! Operators that the engine's own must not do: `*`, which makes a text of any length, and slices, which fail on empty ones.

use minijinja::value::ValueKind;
use minijinja::{Error, State, Value};

use super::meter::{refuse, shallow, spend};

/// The operator `*`, which can make a string or a list of any length.
pub(super) fn times(state: &State<'_, '_>, a: Value, b: Value) -> Result<Value, Error> {
    let repeated = |what: &Value, by: &Value| -> Result<Value, Error> {
        let by = by.as_usize().ok_or_else(|| refuse("a text or list can be repeated a whole number of times only"))?;
        spend(state, shallow(what).max(1).saturating_mul(by))?;
        if let Some(text) = what.as_str() {
            return Ok(Value::from(text.repeat(by)));
        }
        let items: Vec<Value> = what.try_iter()?.collect();
        Ok(Value::from(std::iter::repeat_n(items, by).flatten().collect::<Vec<_>>()))
    };
    let many = |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Iterable);
    if many(&a) {
        return repeated(&a, &b);
    }
    if many(&b) {
        return repeated(&b, &a);
    }
    let unfit = || refuse(&format!("{} times {} is no number", a.kind(), b.kind()));
    if !a.is_integer() && a.kind() == ValueKind::Number || !b.is_integer() && b.kind() == ValueKind::Number {
        let float = |value: &Value| f64::try_from(value.clone()).map_err(|_| unfit());
        return Ok(Value::from(float(&a)? * float(&b)?));
    }
    let whole = |value: &Value| i128::try_from(value.clone()).map_err(|_| unfit());
    let product = whole(&a)?.checked_mul(whole(&b)?).ok_or_else(|| refuse("the product is too large"))?;
    Ok(i64::try_from(product).map_or_else(|_| Value::from(product), Value::from))
}

/// `value[start:stop:step]`, as Python has it.
pub(super) fn slice(
    state: &State<'_, '_>,
    value: Value,
    start: Value,
    stop: Value,
    step: Value,
) -> Result<Value, Error> {
    let given = |part: &Value| match part.is_none() || part.is_undefined() {
        true => Ok(None),
        false => i64::try_from(part.clone()).map(|n| Some(i128::from(n))),
    };
    let (start, stop, step) = (given(&start)?, given(&stop)?, given(&step)?.unwrap_or(1));
    if step == 0 {
        return Err(refuse("the step of a slice is 0"));
    }
    let places = |length: usize| {
        let length = length as i128;
        let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
        let place = |n: i128| if n < 0 { (n + length).max(lowest) } else { n.min(highest) };
        let from = start.map_or(if step > 0 { lowest } else { highest }, place);
        let to = stop.map_or(if step > 0 { highest } else { lowest }, place);
        let within = move |at: &i128| if step > 0 { *at < to } else { *at > to };
        std::iter::successors(Some(from), move |at| Some(at + step)).take_while(within).map(|at| at as usize)
    };
    spend(state, shallow(&value))?;
    if let Some(text) = value.as_str() {
        let letters: Vec<char> = text.chars().collect();
        return Ok(Value::from(places(letters.len()).filter_map(|at| letters.get(at)).collect::<String>()));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::None | ValueKind::Undefined => {
            let items: Vec<Value> = value.try_iter()?.collect();
            Ok(Value::from(places(items.len()).filter_map(|at| items.get(at).cloned()).collect::<Vec<_>>()))
        }
        other => Err(refuse(&format!("{other} cannot be sliced"))),
    }
}
