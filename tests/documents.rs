//! What the documents say is what the binary does.

mod common;

use common::{cluster, repository, run};

#[test]
fn the_page_of_algorithms_is_made_from_their_schemas() {
    let printed = run(cluster().args(["algorithms", "--markdown"])).expect_code(0).stdout + "\n";
    let path = repository("docs/algorithms.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &printed).expect("written");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(kept, printed, "run the tests with UPDATE_DOCS=1 and read the diff");
}

#[test]
fn every_command_is_in_the_page_of_commands() {
    let help = run(cluster().arg("--help")).expect_code(0).stdout;
    let page = std::fs::read_to_string(repository("docs/cli.md")).expect("there");
    let commands = help.split("Commands:").nth(1).expect("a list").split("Options:").next();
    let mut seen = 0;
    for line in commands.expect("a list").lines() {
        let Some(name) = line.strip_prefix("  ").and_then(|l| l.split_whitespace().next()) else {
            continue;
        };
        if line.starts_with("   ") || name == "help" {
            continue;
        }
        seen += 1;
        assert!(page.contains(&format!("`{name}")), "docs/cli.md lacks `{name}`");
    }
    assert!(seen > 15, "{seen} commands in: {help}");
}

#[test]
fn every_example_is_valid() {
    for example in ["digits", "rust-lm", "fashion-mnist"] {
        let text = std::fs::read_to_string(repository(&format!("examples/{example}/job.toml")));
        let folder = repository(&format!("examples/{example}"));
        let mut spec = api::JobSpec::parse(&text.expect("there"), example, &folder, &[])
            .unwrap_or_else(|e| panic!("{example}: {e}"));
        let schema = algorithms::algorithm(&spec.algorithm).expect("known").schema();
        spec.resolve(&schema).unwrap_or_else(|e| panic!("{example}: {e}"));
    }
}
