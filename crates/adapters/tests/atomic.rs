//! A disk that fills up at any byte leaves earlier files and folders whole, and a kill at any instant leaves what can be put
//! right.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::DType;
use common::{Toy, fresh, perturb};
use espalier_adapters::formats::{atomic, folder};
use espalier_adapters::parametrisation::lora::Lora;
use espalier_adapters::{AdapterConfig, Error, MethodConfig};

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).unwrap_or_default()))
        .collect()
}

fn is_full(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
        && error.hint().unwrap().contains("untouched")
}

#[test]
fn a_file_is_the_old_one_or_the_new_one() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("deep/file");
    let (old, new) = (vec![1u8; 700], vec![2u8; 1000]);
    atomic::write(&path, |out| out.write_all(&old)).unwrap();
    for limit in 0..=new.len() as u64 {
        let result = atomic::with_write_limit(limit, || {
            // In pieces, so that the limit falls between and within them.
            atomic::write(&path, |out| new.chunks(300).try_for_each(|piece| out.write_all(piece)))
        });
        let now = contents(path.parent().unwrap());
        assert_eq!(now.len(), 1, "limit {limit}: leftovers {:?}", now.keys());
        if limit < new.len() as u64 {
            assert!(is_full(&result.unwrap_err()), "limit {limit}");
            assert_eq!(now["file"], old, "limit {limit}");
        } else {
            result.unwrap();
            assert_eq!(now["file"], new);
        }
    }
}

#[test]
fn a_folder_is_the_old_one_or_the_new_one() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("folder");
    let fill = |sizes: &'static [usize], byte: u8| {
        move |at: &Path| -> Result<(), Error> {
            sizes.iter().enumerate().try_for_each(|(i, n)| {
                atomic::write(&at.join(format!("{byte}-{i}")), |out| out.write_all(&vec![byte; *n]))
            })
        }
    };
    atomic::replace_folder(&path, fill(&[10, 20, 0], 1)).unwrap();
    let old = contents(&path);
    const NEW: &[usize] = &[50, 1, 200];
    let total: u64 = NEW.iter().map(|n| *n as u64).sum();
    for limit in 0..=total {
        let result = atomic::with_write_limit(limit, || atomic::replace_folder(&path, fill(NEW, 2)));
        assert_eq!(contents(temp.path()).len(), 1, "limit {limit}: leftovers {:?}", contents(temp.path()).keys());
        if limit < total {
            assert!(is_full(&result.unwrap_err()), "limit {limit}");
            assert_eq!(contents(&path), old, "limit {limit}");
        } else {
            result.unwrap();
            let names: Vec<_> = contents(&path).into_iter().map(|(name, bytes)| (name, bytes.len())).collect();
            assert_eq!(names, [("2-0".to_owned(), 50), ("2-1".to_owned(), 1), ("2-2".to_owned(), 200)]);
        }
    }
    let failed = atomic::replace_folder(&path, |_| Err(Error::config("x", "given up")));
    assert!(failed.unwrap_err().to_string().contains("given up"));
    assert_eq!(contents(&path).len(), 3);
}

#[test]
fn an_adapter_saved_over_another_is_one_of_the_two() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("adapter");
    let adapter = |toy: &mut Toy, r: usize| {
        let made = fresh(toy, &AdapterConfig::new(MethodConfig::Lora(Lora { r, ..Lora::default() })), 1, DType::F32);
        perturb(&made, 2);
        made
    };
    let mut toy = Toy::new(DType::F32);
    let (small, large) = (adapter(&mut toy, 2), adapter(&mut toy, 5));
    folder::save(&mut toy, &small, &path).unwrap();
    std::fs::write(path.join("README.md"), "kept").unwrap();
    let old = contents(&path);
    let whole = temp.path().join("whole");
    folder::save(&mut toy, &large, &whole).unwrap();
    let new = contents(&whole);
    let total: u64 = new.values().map(|bytes| bytes.len() as u64).sum();
    let limits = (0..total).step_by(7).chain([total - 1]);
    for limit in limits {
        let result = atomic::with_write_limit(limit, || folder::save(&mut toy, &large, &path));
        assert!(is_full(&result.unwrap_err()), "limit {limit}");
        assert_eq!(contents(&path), old, "limit {limit} of {total}");
    }
    atomic::with_write_limit(total, || folder::save(&mut toy, &large, &path)).unwrap();
    let mut now = contents(&path);
    assert_eq!(now.remove("README.md").unwrap(), b"kept");
    assert_eq!(now, new);
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let mut toy = Toy::new(DType::F32);
    let adapter = fresh(&mut toy, &AdapterConfig::new(MethodConfig::by_name("lora").unwrap()), 1, DType::F32);
    let file = temp.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let message = folder::save(&mut toy, &adapter, &file.join("adapter")).unwrap_err().to_string();
    assert!(message.contains("adapter"), "{message}");
    let message = atomic::replace_folder(&file.join("run"), |_| Ok::<(), Error>(())).unwrap_err().to_string();
    assert!(message.contains("run"), "{message}");
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    let closed = temp.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    let mut mode = std::fs::metadata(&closed).unwrap().permissions();
    mode.set_readonly(true);
    std::fs::set_permissions(&closed, mode).unwrap();
    // Some users (root) may write anyway.
    if std::fs::write(closed.join("probe"), "x").is_err() {
        let message = folder::save(&mut toy, &adapter, &closed).unwrap_err().to_string();
        assert!(message.contains("closed"), "{message}");
        assert!(contents(&closed).is_empty());
    }
}

/// Ends `f` before each of its renames and removals in turn, with `check` after each; gives how many there were.
fn killed_everywhere(mut f: impl FnMut(), mut check: impl FnMut(u32)) -> u32 {
    for n in 0.. {
        if catch_unwind(AssertUnwindSafe(|| atomic::with_kill_before(n, &mut f))).is_ok() {
            return n;
        }
        check(n);
    }
    unreachable!()
}

fn hidden(folder: &Path) -> Vec<String> {
    contents(folder).into_keys().filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_kill_at_any_instant_of_replacing_a_folder_leaves_the_old_or_the_new_one() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("step-1");
    let write = |byte: u8| {
        atomic::replace_folder(&path, |at| atomic::write(&at.join("file"), |out| out.write_all(&[byte; 9]))).unwrap();
    };
    write(1);
    let mut restored = 0;
    let kills = killed_everywhere(
        || write(2),
        |n| {
            let found = atomic::recover(temp.path()).unwrap();
            restored += found.restored.len();
            assert!(!found.is_empty() && hidden(temp.path()).is_empty(), "{n}: {found:?} {:?}", hidden(temp.path()));
            let now = contents(&path)["file"].clone();
            assert!(now == [1; 9] || now == [2; 9], "{n}: {now:?}");
            write(1);
        },
    );
    assert!(kills >= 4 && restored == 1, "{kills} instants, {restored} folders put back");
    assert!(atomic::recover(temp.path()).unwrap().is_empty());
    // Without a word to `recover`, the next write finds what a kill left.
    let _ = catch_unwind(AssertUnwindSafe(|| atomic::with_kill_before(2, || write(3))));
    assert!(!path.exists() && !hidden(temp.path()).is_empty());
    let failed = atomic::replace_folder(&path, |_| Err(Error::config("x", "given up")));
    assert!(failed.unwrap_err().to_string().contains("given up"));
    assert_eq!(contents(&path)["file"], [2; 9]);
    assert!(hidden(temp.path()).is_empty());
    // A removal cannot leave half a folder under its name.
    let kills = killed_everywhere(
        || atomic::remove_folder(&path).unwrap(),
        |_| {
            atomic::recover(temp.path()).unwrap();
            assert!(hidden(temp.path()).is_empty());
            if !path.exists() {
                write(4);
            }
            assert_eq!(contents(&path).len(), 1);
        },
    );
    assert!(kills == 2 && contents(temp.path()).is_empty());
}

#[test]
fn leftovers_of_other_processes_are_removed_and_those_of_running_ones_are_not() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    for (name, byte) in [(".a.4000001.old", 1), (".b.4000001.old", 2), (".c.4000001.tmp", 3), ("b", 4)] {
        std::fs::create_dir(at(name)).unwrap();
        std::fs::write(at(name).join("file"), [byte]).unwrap();
    }
    for name in [".d.json.4000002.tmp", ".gitignore", ".x.y.tmp", "notes.7.tmp"] {
        std::fs::write(at(name), "x").unwrap();
    }
    let running = std::fs::File::open(at(".c.4000001.tmp")).unwrap();
    running.lock().unwrap();
    let found = atomic::recover(temp.path()).unwrap();
    assert_eq!(found.restored, [at("a")]);
    assert_eq!(found.removed.len(), 2, "{found:?}");
    let names: Vec<String> = contents(temp.path()).into_keys().collect();
    assert_eq!(names, [".c.4000001.tmp", ".gitignore", ".x.y.tmp", "a", "b", "notes.7.tmp"]);
    assert_eq!((contents(&at("a"))["file"][0], contents(&at("b"))["file"][0]), (1, 4));
    drop(running);
    assert_eq!(atomic::recover(temp.path()).unwrap().removed, [at(".c.4000001.tmp")]);
    assert!(atomic::recover(&at("nowhere")).unwrap().is_empty());
}

#[test]
fn a_kill_while_an_adapter_is_saved_over_another_never_pairs_new_weights_with_old_settings() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("adapter");
    let mut toy = Toy::new(DType::F32);
    // Of equal shapes, so that nothing but the settings tells them apart.
    let mut adapters = [4.0, 32.0].map(|alpha| {
        let lora = Lora { r: 3, alpha, ..Lora::default() };
        let made = fresh(&mut toy, &AdapterConfig::new(MethodConfig::Lora(lora)), alpha as u64, DType::F32);
        perturb(&made, alpha as u64);
        made
    });
    let mut save = |i: usize| {
        folder::save(&mut toy, &adapters[i], &path).unwrap();
        contents(&path)
    };
    let (old, new) = (save(0), save(1));
    save(0);
    let (mut kept, mut made, mut completed) = (0, 0, 0);
    let toy = std::cell::RefCell::new(Toy::new(DType::F32));
    let save = |adapter: &espalier_adapters::attach::Attached| {
        folder::save(&mut *toy.borrow_mut(), adapter, &path).unwrap();
    };
    let visible = || {
        let mut files = contents(&path);
        files.retain(|name, _| !name.starts_with('.'));
        files
    };
    let [first, second] = &mut adapters;
    killed_everywhere(
        || save(second),
        |n| {
            let torn = visible();
            // Reading puts in place what the killed save had committed.
            folder::read(&path).unwrap();
            let now = visible();
            assert!(now == old || now == new, "{n}: {:?}", now.keys());
            kept += usize::from(now == old);
            made += usize::from(now == new);
            completed += usize::from(torn != now);
            atomic::recover(&path).unwrap();
            assert_eq!(contents(&path), now, "{n}: something is left over");
            save(first);
        },
    );
    assert_eq!(contents(&path), new);
    assert!(kept > 0 && made > 0 && completed > 0, "{kept} kept, {made} made, {completed} completed by reading");
}
