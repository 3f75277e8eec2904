//! Packing: several examples in one row of `max_length` tokens, so that little is padding.
//!
//! Best fit decreasing: from the longest to the shortest, each example goes into the fullest row that still has room (at
//! most 11/9 of the fewest possible rows, Johnson 1973). In order: a row is filled until the next example does not fit,
//! which keeps the order of the data exactly.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};

/// How examples share rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// One example a row.
    #[default]
    Off,
    /// Best fit decreasing; ties in the order given.
    BestFit,
    /// Next fit in the order given.
    InOrder,
}

/// Rows of positions in `lengths`. Each position occurs exactly once; the lengths of a row add up to at most `max_length`.
pub fn pack(lengths: &[usize], max_length: usize, packing: Packing) -> Result<Vec<Vec<usize>>> {
    if let Some((index, &length)) = lengths.iter().enumerate().find(|(_, length)| **length > max_length) {
        return Err(DataError::TooLong { index, length, max_length });
    }
    Ok(match packing {
        Packing::Off => (0..lengths.len()).map(|at| vec![at]).collect(),
        Packing::InOrder => in_order(lengths, max_length),
        Packing::BestFit => best_fit(lengths, max_length),
    })
}

fn in_order(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (at, &length) in lengths.iter().enumerate() {
        match rows.last_mut() {
            Some(row) if length <= room => row.push(at),
            _ => {
                rows.push(vec![at]);
                room = max_length;
            }
        }
        room -= length;
    }
    rows
}

fn best_fit(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    let length = |at: usize| lengths.get(at).copied().unwrap_or(0);
    order.sort_by_key(|at| std::cmp::Reverse(length(*at)));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room they have left.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for at in order {
        let need = length(at);
        let fullest = open.range(need..).next().map(|(room, _)| *room);
        let (row, room) = match fullest.and_then(|room| Some((open.get_mut(&room)?.pop()?, room))) {
            Some((row, room)) => {
                if open.get(&room).is_some_and(Vec::is_empty) {
                    open.remove(&room);
                }
                (row, room)
            }
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, max_length)
            }
        };
        if let Some(row) = rows.get_mut(row) {
            row.push(at);
        }
        open.entry(room - need).or_default().push(row);
    }
    rows
}
