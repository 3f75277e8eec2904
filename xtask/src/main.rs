//! Repository habits.
fn main() {}
