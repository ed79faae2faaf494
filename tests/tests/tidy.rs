//! Tidiness is a test: what a reviewer should not have to look for. Each law lists all that breaks it at once.
//!
//! Reads the files as they lie there, without git, because a new machine may have none.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a Rust file without its tests; longer ones are hard to hold in one head.
const MAX_LINES: usize = 600;
/// Files that may be longer, with the reason.
const LONG_FILES: &[(&str, &str)] = &[];
/// Crate roots without `#![forbid(unsafe_code)]`, with the reason.
const MAY_HAVE_UNSAFE: &[(&str, &str)] = &[(
    "dm/src/lib.rs",
    "the loop driver's ioctls, in `loops/sys.rs` alone; the crate denies it elsewhere",
)];
/// Folders without clock, I/O or async, and what gives a breach away.
const PURE_FOLDERS: &[&str] = &["types/src", "coordinator/src/tree", "compute-agent/src/stack"];
const IMPURE_WORDS: &[&str] = &[
    "tokio",
    "async fn",
    ".await",
    "Instant::now",
    "SystemTime",
    "std::fs",
    "std::net::Tcp",
    "std::process",
    "std::thread",
    "rand::",
];
/// A tracked file that is larger is probably something that was built.
const MAX_FILE_BYTES: u64 = 512 * 1024;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are one folder below the root")
        .to_path_buf()
}

/// All files of the tree, relative to the root, without what `.gitignore` leaves out.
fn files() -> Vec<String> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).expect("a folder of the workspace can be read") {
            let entry = entry.expect("an entry can be read");
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().expect("an entry has a type");
            if kind.is_dir() {
                if !matches!(name.as_str(), "target" | ".git" | "artifacts" | "corpus") {
                    walk(&path, root, found);
                }
            } else if kind.is_file() && !name.ends_with(".img") && !name.ends_with(".log") && name != ".git" {
                let relative = path.strip_prefix(root).expect("it lies under the root");
                found.push(relative.to_string_lossy().into_owned());
            }
        }
    }
    let root = root();
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    found.sort();
    found
}

fn read(file: &str) -> String {
    let bytes = fs::read(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn rust_files() -> Vec<String> {
    let mut files = files();
    files.retain(|file| file.ends_with(".rs"));
    files
}

fn is_test_file(file: &str) -> bool {
    let parts: Vec<&str> = file.split('/').collect();
    let inside = |name: &str| parts.iter().skip(1).any(|part| *part == name);
    inside("tests") || inside("benches") || file.ends_with("/tests.rs") || file.ends_with("_tests.rs")
}

/// The part of a Rust file above its test module.
fn without_tests(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut lines = text.lines().enumerate().peekable();
    std::iter::from_fn(move || {
        let (number, line) = lines.next()?;
        let tests_follow = line.trim() == "#[cfg(test)]"
            && lines
                .peek()
                .is_some_and(|(_, next)| next.starts_with("mod ") && next.ends_with('{'));
        (!tests_follow).then_some((number + 1, line))
    })
    .fuse()
}

fn none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

struct Package {
    folder: String,
    name: String,
    manifest: toml::Table,
}

fn packages() -> Vec<Package> {
    let workspace: toml::Table = read("Cargo.toml").parse().expect("Cargo.toml parses");
    let members = workspace["workspace"]["members"]
        .as_array()
        .expect("members is a list");
    members
        .iter()
        .map(|member| {
            let folder = member.as_str().expect("a member is a text").to_owned();
            let manifest: toml::Table = read(&format!("{folder}/Cargo.toml"))
                .parse()
                .expect("a member's Cargo.toml parses");
            let name = manifest["package"]["name"]
                .as_str()
                .expect("a package has a name")
                .to_owned();
            Package {
                folder,
                name,
                manifest,
            }
        })
        .collect()
}

/// The rows of docs/architecture.md's map: folder → (crate, what it may use).
fn map_of_the_architecture() -> BTreeMap<String, (String, String)> {
    let page = read("docs/architecture.md");
    let rows = page
        .lines()
        .skip_while(|line| !line.starts_with("## Map"))
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [folder, name, _, uses] = cells[..] else {
            panic!("a row of the map without four cells: {row}");
        };
        let bare = |cell: &str| cell.trim_matches(['`', '/']).to_owned();
        (bare(folder), (bare(name), uses.to_owned()))
    })
    .collect()
}

#[test]
fn crates_use_only_what_the_architecture_allows() {
    let packages = packages();
    let map = map_of_the_architecture();
    let folder_of: BTreeMap<&str, &str> = packages
        .iter()
        .map(|package| (package.name.as_str(), package.folder.as_str()))
        .collect();
    let mut problems = Vec::new();
    for package in &packages {
        let Some((name, uses)) = map.get(&package.folder) else {
            problems.push(format!(
                "{}: not in the map of docs/architecture.md",
                package.folder
            ));
            continue;
        };
        if *name != package.name {
            problems.push(format!(
                "{}: the map calls it {name}, it is {}",
                package.folder, package.name
            ));
        }
        let allowed: BTreeSet<&str> = match uses.as_str() {
            "all" => folder_of.values().copied().collect(),
            "none of ours" => BTreeSet::new(),
            list => list.split(", ").collect(),
        };
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = package.manifest.get(kind).and_then(toml::Value::as_table) else {
                continue;
            };
            for dependency in table.keys() {
                let Some(folder) = folder_of.get(dependency.as_str()) else {
                    continue;
                };
                if !allowed.contains(folder) {
                    problems.push(format!(
                        "{}/Cargo.toml: {kind} name {dependency}; the map allows {uses:?}",
                        package.folder
                    ));
                }
            }
        }
    }
    for folder in map.keys() {
        if !packages.iter().any(|package| package.folder == *folder) {
            problems.push(format!(
                "docs/architecture.md: the map has {folder}, the workspace has not"
            ));
        }
    }
    none(&problems);
}

#[test]
fn every_package_takes_lints_licence_and_edition_from_the_workspace() {
    let mut problems = Vec::new();
    for package in packages() {
        let inherits = |section: &str, key: Option<&str>| {
            let mut value = package.manifest.get(section);
            if let Some(key) = key {
                value = value.and_then(|section| section.get(key));
            }
            value
                .and_then(|value| value.get("workspace"))
                .and_then(toml::Value::as_bool)
                == Some(true)
        };
        if !inherits("lints", None) {
            problems.push(format!("{}/Cargo.toml: no lints.workspace", package.folder));
        }
        for key in ["version", "edition", "rust-version", "license", "publish"] {
            if !inherits("package", Some(key)) {
                problems.push(format!("{}/Cargo.toml: no {key}.workspace", package.folder));
            }
        }
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let table = package.manifest.get(kind).and_then(toml::Value::as_table);
            for (name, value) in table.into_iter().flatten() {
                if value.get("workspace").is_none() {
                    problems.push(format!(
                        "{}/Cargo.toml: {name} has a version of its own",
                        package.folder
                    ));
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn rust_files_stay_short_without_their_tests() {
    let mut problems = Vec::new();
    for file in rust_files().iter().filter(|file| !is_test_file(file)) {
        let lines = without_tests(&read(file)).count();
        let excused = LONG_FILES.iter().any(|(excused, _)| excused == file);
        if lines > MAX_LINES && !excused {
            problems.push(format!(
                "{file}: {lines} lines without tests, at most {MAX_LINES}"
            ));
        }
        if lines <= MAX_LINES && excused {
            problems.push(format!("{file}: no longer needs its exception in tidy.rs"));
        }
    }
    none(&problems);
}

#[test]
fn nothing_is_left_to_do_in_the_code() {
    // Put together here, so that this file does not find itself.
    let marks = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    let words = [
        "TO".to_owned() + "DO",
        "FIX".to_owned() + "ME",
        "XX".to_owned() + "X",
    ];
    let mut problems = Vec::new();
    for file in rust_files() {
        for (number, line) in read(&file).lines().enumerate() {
            let marked = marks.iter().any(|mark| line.contains(mark.as_str()));
            let comment = line.split_once("//").is_some_and(|(_, comment)| {
                comment
                    .split(|c: char| !c.is_ascii_alphanumeric())
                    .any(|word| words.iter().any(|w| w == word))
            });
            if marked || comment {
                problems.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none(&problems);
}

#[test]
fn a_test_that_is_left_out_says_why() {
    let mark = "#[ignore".to_owned() + "]";
    let mut problems = Vec::new();
    for file in rust_files() {
        for (number, line) in read(&file).lines().enumerate() {
            if line.trim() == mark {
                problems.push(format!("{file}:{}: a test ignored without a reason", number + 1));
            }
        }
    }
    none(&problems);
}

#[test]
fn crates_forbid_unsafe_or_are_listed_with_a_reason() {
    let mut problems = Vec::new();
    for file in rust_files() {
        let parts: Vec<&str> = file.split('/').collect();
        let is_root = match parts[..] {
            [_, "src", "lib.rs" | "main.rs"] => true,
            [_, "src", "bin", ..] => file.ends_with("/main.rs"),
            _ => false,
        };
        if !is_root {
            continue;
        }
        let forbids = read(&file).contains("#![forbid(unsafe_code)]");
        let listed = MAY_HAVE_UNSAFE.iter().any(|(listed, _)| *listed == file);
        if !forbids && !listed {
            problems.push(format!("{file}: no #![forbid(unsafe_code)]"));
        }
        if forbids && listed {
            problems.push(format!("{file}: forbids unsafe, and is still listed in tidy.rs"));
        }
    }
    none(&problems);
}

#[test]
fn the_state_machines_have_no_clock_no_io_and_no_async() {
    let mut problems = Vec::new();
    for file in rust_files() {
        let pure = PURE_FOLDERS
            .iter()
            .any(|folder| file.starts_with(&format!("{folder}/")) || file == format!("{folder}.rs"));
        if !pure || is_test_file(&file) {
            continue;
        }
        for (number, line) in without_tests(&read(&file)) {
            let code = line.split("//").next().unwrap_or_default();
            if let Some(word) = IMPURE_WORDS.iter().find(|word| code.contains(**word)) {
                problems.push(format!("{file}:{number}: {word} in a pure folder"));
            }
        }
    }
    none(&problems);
}

#[test]
fn anyhow_stays_in_mains_xtask_and_tests() {
    let mut problems = Vec::new();
    for file in rust_files() {
        let may = file.starts_with("xtask/")
            || file.starts_with("tests/")
            || file.ends_with("/main.rs")
            || is_test_file(&file);
        // The program `treeboot` is all main: what it meets goes to a person, not to a caller.
        if may || file.starts_with("cli/") {
            continue;
        }
        for (number, line) in without_tests(&read(&file)) {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("anyhow::") {
                problems.push(format!("{file}:{number}: {}", line.trim()));
            }
        }
    }
    none(&problems);
}

#[test]
fn no_file_names_a_place_of_the_machine_it_was_written_on() {
    // The guests' own folders are meant there.
    const GUESTS: &str = "xtask/src/guest/";
    let places = [
        "/wo".to_owned() + "rk/",
        "/ro".to_owned() + "ot/",
        "/ho".to_owned() + "me/",
    ];
    let mut problems = Vec::new();
    for file in files().into_iter().filter(|file| !file.starts_with(GUESTS)) {
        for (number, line) in read(&file).lines().enumerate() {
            if let Some(place) = places.iter().find(|place| line.contains(place.as_str())) {
                problems.push(format!("{file}:{}: names {place}", number + 1));
            }
        }
    }
    none(&problems);
}

#[test]
fn packages_come_from_the_public_registry() {
    let lock = read("Cargo.lock");
    let problems: Vec<String> = lock
        .lines()
        .filter(|line| line.starts_with("source = "))
        .filter(|line| *line != "source = \"registry+https://github.com/rust-lang/crates.io-index\"")
        .map(|line| format!("Cargo.lock: {line}"))
        .collect();
    none(&problems);
}

#[test]
fn files_are_text_of_a_modest_size_that_ends_with_a_line() {
    let mut problems = Vec::new();
    for file in files() {
        let bytes = fs::read(root().join(&file)).expect("a file can be read");
        if bytes.len() as u64 > MAX_FILE_BYTES {
            problems.push(format!("{file}: {} bytes; is it something built?", bytes.len()));
        }
        // What a fuzzer starts from is bytes.
        if file.starts_with("fuzz/seeds/") || file.starts_with("fuzz/kept/") {
            continue;
        }
        let Ok(text) = std::str::from_utf8(&bytes) else {
            problems.push(format!("{file}: not UTF-8"));
            continue;
        };
        if !text.is_empty() && !text.ends_with('\n') {
            problems.push(format!("{file}: its last line has no end"));
        }
        for (number, line) in text.lines().enumerate() {
            if line.ends_with([' ', '\t', '\r']) {
                problems.push(format!("{file}:{}: blanks at its end", number + 1));
            }
        }
    }
    none(&problems);
}

#[test]
fn links_of_the_docs_lead_somewhere() {
    let mut problems = Vec::new();
    for file in files().iter().filter(|file| file.ends_with(".md")) {
        let folder = Path::new(file).parent().unwrap_or(Path::new("")).to_path_buf();
        for (number, line) in read(file).lines().enumerate() {
            for link in line.split("](").skip(1) {
                let target = link.split([')', '#']).next().unwrap_or_default();
                let elsewhere = target.contains("://") || target.is_empty();
                if !elsewhere && !root().join(&folder).join(target).exists() {
                    problems.push(format!("{file}:{}: {target} is not there", number + 1));
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn paths_that_the_docs_name_exist() {
    let tops: Vec<String> = packages()
        .into_iter()
        .map(|package| package.folder)
        .chain([".ci".into(), "docs".into()])
        .collect();
    let mut problems = Vec::new();
    for file in files().iter().filter(|file| file.ends_with(".md")) {
        for (number, line) in read(file).lines().enumerate() {
            // Every second piece between backticks is code.
            for code in line.split('`').skip(1).step_by(2) {
                let path = code.split(['*', '{', '<', ' ', ':']).next().unwrap_or_default();
                let ours = path
                    .split_once('/')
                    .is_some_and(|(top, rest)| tops.iter().any(|t| t == top) && !rest.is_empty());
                if ours && !root().join(path).exists() {
                    problems.push(format!("{file}:{}: {path} is not there", number + 1));
                }
            }
        }
    }
    none(&problems);
}

#[test]
fn decisions_are_numbered_once_and_titled() {
    let mut seen = BTreeMap::new();
    let mut problems = Vec::new();
    for file in files() {
        let Some(name) = file.strip_prefix("docs/decisions/") else {
            continue;
        };
        if name == "README.md" {
            continue;
        }
        let Some((number, _)) = name
            .split_once('-')
            .filter(|(number, _)| number.len() == 4 && number.bytes().all(|b| b.is_ascii_digit()))
        else {
            problems.push(format!("{file}: not NNNN-title.md"));
            continue;
        };
        if let Some(other) = seen.insert(number.to_owned(), file.clone()) {
            problems.push(format!("{file}: {other} has this number already"));
        }
        if !read(&file).starts_with(&format!("# {number} ")) {
            problems.push(format!("{file}: its first line is not '# {number} Title'"));
        }
    }
    none(&problems);
}

#[test]
fn what_a_newcomer_looks_for_is_there() {
    let mut problems: Vec<String> = [
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "Cargo.lock",
        ".ci/run",
        "docs/architecture.md",
        "docs/decisions/README.md",
    ]
    .iter()
    .filter(|file| !root().join(file).is_file())
    .map(|file| format!("{file} is missing"))
    .collect();
    if !read("CHANGELOG.md").contains("\n## Unreleased\n") {
        problems.push("CHANGELOG.md: no section 'Unreleased'".into());
    }
    none(&problems);
}

#[test]
fn ci_runs_what_the_readme_tells_a_person_to_run() {
    let command = "cargo xtask test";
    assert!(read("README.md").lines().any(|line| line.starts_with(command)));
    assert!(read(".ci/run").contains(&format!("exec {command}\n")));
}
