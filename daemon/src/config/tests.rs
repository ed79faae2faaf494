//! Files as a person writes them, and what comes of them.

use std::ffi::OsString;

use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
#[command(name = "d")]
struct Daemon {
    #[arg(long, default_value_t = 7)]
    beat_ms: u64,
    #[arg(long, env = "TREEBOOT_TEST_CONFIG_NAME")]
    name: String,
    #[arg(long)]
    insecure: bool,
    #[arg(long = "label", value_delimiter = ',')]
    labels: Vec<String>,
    #[command(flatten)]
    file: ConfigFile,
}

/// Reads `text` as the file, with these arguments beside it.
fn check(text: &str, arguments: &[&str]) -> Result<Read<Daemon>, String> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("d.toml");
    std::fs::write(&path, text).expect("written");
    let mut all: Vec<OsString> = vec!["d".into(), "--config".into(), path.clone().into()];
    all.extend(arguments.iter().map(Into::into));
    read(all).map_err(|failure| {
        let text = match failure {
            Failure::Clap(error) => error.to_string(),
            Failure::File(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                format!("{error}: {}", source.unwrap_or_default())
            }
        };
        text.replace(&path.display().to_string(), "FILE")
    })
}

fn from<'a>(read: &'a Read<Daemon>, key: &str) -> (&'static str, &'a [String]) {
    let setting = read.settings.iter().find(|setting| setting.key == key);
    setting.map_or(("nobody", &[]), |setting| (setting.from, &setting.values))
}

#[test]
fn a_key_is_an_options_long_name_and_a_flag_goes_before_it() {
    let file = "name = 'a'\nbeat-ms = 500\ninsecure = true\nlabel = ['rack=1', 'zone=b']\n";
    let read = check(file, &["--beat-ms", "9"]).expect("whole");
    let options = &read.options;
    assert_eq!(
        (options.name.as_str(), options.beat_ms, options.insecure),
        ("a", 9, true)
    );
    assert_eq!(options.labels, ["rack=1", "zone=b"]);
    assert_eq!(from(&read, "beat-ms"), ("flag", &["9".to_owned()][..]));
    assert_eq!(from(&read, "name"), ("file", &["a".to_owned()][..]));
    let plain = check("name = 'a'", &[]).expect("whole");
    assert_eq!(from(&plain, "beat-ms"), ("default", &["7".to_owned()][..]));
    assert!(plain.options.file.config.is_some());
}

#[test]
fn what_is_required_may_stand_in_the_file_alone_and_is_missed_where_it_stands_nowhere() {
    assert!(check("name = 'a'", &[]).is_ok());
    let error = check("beat-ms = 1", &[]).expect_err("no name");
    assert!(error.contains("--name"), "{error}");
}

#[test]
fn a_table_is_a_list_of_labels_and_a_hyphen_begins_a_value() {
    let read = check("name = '--odd'\n[label]\nrack = 'r 1'\nrow = 3\n", &[]).expect("whole");
    assert_eq!(read.options.labels, ["rack=r 1", "row=3"]);
    assert_eq!(read.options.name, "--odd");
}

#[test]
fn what_is_wrong_in_a_file_is_named_with_the_way_out() {
    let cases = [
        (
            "beat_ms = 1",
            "there is no option 'beat_ms'; did you mean 'beat-ms'?",
        ),
        ("colour = 1", "there are: beat-ms, name, insecure, label"),
        ("config = 'x'", "there is no option 'config'"),
        ("name = ['a']", "'name' takes one value"),
        ("insecure = 'yes'", "'insecure' is true or false"),
        ("label = [[1]]", "'label' is a list of texts and numbers"),
        ("name = 2020-01-01", "'name' is a text, a number"),
        ("name = ", "is not TOML"),
        ("name = 'a'\nbeat-ms = 'soon'", "'beat-ms' stands in FILE"),
    ];
    for (file, expected) in cases {
        let error = check(file, &[]).map(|_| ()).expect_err(file);
        assert!(error.contains(expected), "{file}: {error}");
        assert!(error.contains("FILE"), "{file}: {error}");
    }
    let missing = read::<Daemon>(["d", "--config", "/nowhere/d.toml"].map(OsString::from).into());
    let Err(Failure::File(error)) = missing else {
        panic!("read from nowhere");
    };
    assert!(error.to_string().contains("/nowhere/d.toml"), "{error}");
}
