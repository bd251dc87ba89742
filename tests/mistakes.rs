//! What a user does wrong, each with one clear message, its own exit code, and nothing half-done.

mod common;

use std::net::TcpListener;
use std::path::Path;

use common::{Finished, Running, cluster, eventually, run, small_job, submit_local};
use nix::sys::signal::Signal;

/// Fails unless the command ended with `code` and its one message holds all of `expected`.
fn refused(finished: Finished, code: i32, expected: &[&str]) {
    let finished = finished.expect_code(code);
    let errors: Vec<&str> =
        finished.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "one message: {finished:?}");
    for text in expected {
        assert!(finished.stderr.contains(text), "`{text}` is missing: {finished:?}");
    }
    assert!(!finished.stderr.contains("panicked"), "{finished:?}");
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// A submit that must not even begin: the run's folder is not made.
fn refused_before_anything(extra: &str, sets: &[&str], code: i32, expected: &[&str]) {
    let folder = folder();
    let job = small_job(folder.path(), extra);
    let dir = folder.path().join("run");
    refused(run(&mut submit_local(&job, &dir, sets)), code, expected);
    assert!(!dir.exists(), "nothing was made");
}

#[test]
fn unknown_keys_name_the_nearest_one() {
    refused_before_anything(
        "[resorces]\nranks = 2\n",
        &[],
        2,
        &["unknown key `resorces`; did you mean `resources`?", "line"],
    );
    refused_before_anything(
        "",
        &["hyperparameters.learning_rat=1"],
        2,
        &["`learning_rat`; did you mean `learning_rate`?"],
    );
    refused_before_anything(
        "",
        &["hyperparameters.width=-3"],
        2,
        &["width", "a whole number from"],
    );
    let folder = folder();
    let config = folder.path().join("cluster.toml");
    std::fs::write(&config, "[coordinator]\nelection_timout = \"1s\"\n").expect("written");
    let mut up = cluster();
    up.args(["up", "--config"]).arg(&config).arg("--dir").arg(folder.path().join("c"));
    refused(run(&mut up), 2, &["`election_timout`; did you mean `election_timeout`?"]);
}

#[test]
fn more_ranks_than_lanes() {
    refused_before_anything(
        "",
        &["resources.ranks=9"],
        2,
        &["resources.ranks = 9 is more than batch.lanes = 8"],
    );
}

#[test]
fn a_metric_that_nobody_reports() {
    let best =
        |metric: &str| format!("checkpoint.keep_best={{ metric = \"{metric}\", mode = \"min\" }}");
    refused_before_anything(
        "",
        &[&best("train:lozz")],
        2,
        &["checkpoint.keep_best.metric `train:lozz`; did you mean `train:loss`?", "train:accuracy"],
    );
    let unvalidated = ["evaluate.every_steps=5", &best("validation:loss")];
    refused_before_anything(
        "",
        &unvalidated,
        2,
        &["`validation:loss`, but the job validates nothing", "channels.validation", "train:loss"],
    );
    refused_before_anything(
        "",
        &["checkpoint.keep=0"],
        2,
        &["integer `0`, expected a whole number of at least 1"],
    );
    let folder = folder();
    let job = small_job(folder.path(), "");
    let held_out = ["hyperparameters.validation_fraction=0.1", "stop.max_steps=5"];
    let sets = [&unvalidated[..], &held_out].concat();
    run(&mut submit_local(&job, &folder.path().join("run"), &sets)).expect_code(0);
}

#[test]
fn missing_data() {
    refused_before_anything(
        "",
        &["channels.train.uri=\"file://nowhere.txt\""],
        2,
        &["channels.train", "nowhere.txt` does not exist"],
    );
    refused_before_anything("", &["algorithm=\"transformr\""], 2, &["did you mean `transformer`?"]);
}

#[test]
fn training_that_diverges_stops_or_skips_as_the_job_says() {
    for (policy, expected) in [
        (&[][..], "at step 14: training diverged"),
        (
            &["stop.divergence=\"skip\"", "stop.max_skips=2"][..],
            "at step 16, after 2 skipped ones in a row: training diverged",
        ),
    ] {
        let folder = folder();
        let job = small_job(folder.path(), "");
        let mut sets = vec!["hyperparameters.learning_rate=10", "hyperparameters.weight_decay=10"];
        sets.extend(policy);
        let finished = run(&mut submit_local(&job, &folder.path().join("run"), &sets));
        refused(finished, 7, &["the loss is", expected]);
    }
}

#[test]
fn cuda_without_cuda() {
    refused_before_anything(
        "",
        &["resources.device=\"cuda\""],
        2,
        &["device = \"cuda\"", "resources.device = \"cpu\""],
    );
}

#[test]
fn data_of_the_wrong_shape() {
    let folder = folder();
    std::fs::write(folder.path().join("bad.csv"), "p0,p1,p2,p3,label\n1,2,3,4,a\n1,2,b\n")
        .expect("written");
    let job = folder.path().join("job.toml");
    std::fs::write(
        &job,
        "name = \"bad\"\nalgorithm = \"image-classification\"\n[channels]\n\
         train = { uri = \"file://bad.csv\" }\n[stop]\nmax_steps = 2\n",
    )
    .expect("written");
    let dir = folder.path().join("run");
    let finished = run(&mut submit_local(&job, &dir, &[]));
    assert!(finished.stderr.contains("line 3"), "the line is named: {finished:?}");
    refused(finished, 2, &["bad.csv"]);
    assert!(!dir.exists(), "nothing was made");

    // A folder of data is read by the ranks only: the job fails at once, a user's mistake is not
    // tried again, and the message is the same.
    let classes = folder.path().join("classes/a");
    std::fs::create_dir_all(&classes).expect("made");
    std::fs::write(classes.join("bad.png"), "not a picture").expect("written");
    let finished = run(&mut submit_local(&job, &dir, &["channels.train.uri=\"file://classes\""]));
    let finished = finished.expect_code(7);
    let last = finished.last_json();
    assert_eq!((&last["state"], &last["restarts"]), (&"failed".into(), &0.into()), "{last}");
    assert!(last["reason"].as_str().expect("a reason").contains("bad.png"), "{last}");
}

#[test]
fn a_taken_port() {
    let folder = folder();
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = holder.local_addr().expect("bound").port().to_string();
    let mut up = cluster();
    up.args(["up", "--port", &port, "--dir"]).arg(folder.path().join("c"));
    refused(run(&mut up), 5, &["cannot listen on 127.0.0.1:", "--port"]);

    let small = train_small(folder.path());
    let address = holder.local_addr().expect("bound").to_string();
    let mut serve = cluster();
    serve.arg("serve").arg(small).args(["--listen", &address]);
    refused(run(&mut serve), 5, &["cannot listen on", "--listen"]);
    let mut open = cluster();
    open.args(["serve", "x", "--listen", "0.0.0.0:0"]);
    refused(run(&mut open), 2, &["0.0.0.0", "not loopback"]);
}

/// Trains the small job; gives the model's folder.
fn train_small(folder: &Path) -> std::path::PathBuf {
    let job = small_job(folder, "");
    let run_dir = folder.join("run");
    let finished = run(&mut submit_local(&job, &run_dir, &["stop.max_steps=10"])).expect_code(0);
    let last = finished.last_json();
    let weights = Path::new(last["model"].as_str().expect("a path")).to_owned();
    weights.parent().expect("in a folder").to_owned()
}

#[test]
fn a_taken_name_and_a_flipped_byte() {
    let folder = folder();
    train_small(folder.path());
    let job = folder.path().join("job.toml");
    let dir = folder.path().join("run");
    let finished = run(&mut submit_local(&job, &dir, &[])).expect_code(4);
    assert!(finished.stderr.contains("small"), "{finished:?}");

    // One byte of a shard of the newest checkpoint, flipped.
    let shard = newest(&dir.join("store/jobs/small/checkpoints"), ".safetensors");
    let mut bytes = std::fs::read(&shard).expect("a shard");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&shard, bytes).expect("written");
    let config = ["up", "--port", "0", "--json", "--dir"];
    let mut up = cluster();
    let mut up = Running::start(up.args(config).arg(&dir));
    up.wait_for("up", |event| event["event"] == "up");
    let mut verify = cluster();
    verify.args(["checkpoint", "verify", "small", "--dir"]).arg(&dir);
    let verified = run(&mut verify);
    assert!(verified.stdout.contains("DAMAGED"), "{verified:?}");
    let name = shard.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(verified.stdout.contains(&name), "the shard is named: {verified:?}");
    refused(verified, 9, &["damaged"]);
    let mut export = cluster();
    let exported = folder.path().join("w.safetensors");
    export.args(["checkpoint", "export", "small", "-o"]).arg(&exported).arg("--dir").arg(&dir);
    let export = run(&mut export);
    assert!(export.code == 9 && !exported.exists(), "nothing half-written: {export:?}");
    let mut diff = cluster();
    let diff = run(diff.args(["checkpoint", "diff", "small", "--dir"]).arg(&dir));
    refused(diff, 9, &[&name]);
    // The one before is whole.
    let mut older = cluster();
    older.args(["checkpoint", "export", "small", "--step", "5", "-o"]).arg(&exported);
    run(older.arg("--dir").arg(&dir)).expect_code(0);
    assert!(exported.exists());
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

/// The last file below `folder`, in sorted order, whose name contains `part`.
fn newest(folder: &Path, part: &str) -> std::path::PathBuf {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder).expect("a folder").flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries.iter().rev() {
        if path.is_dir() {
            return newest(path, part);
        }
        if path.file_name().is_some_and(|name| name.to_string_lossy().contains(part)) {
            return path.clone();
        }
    }
    panic!("no {part} in {}", folder.display());
}

#[test]
fn a_folder_in_use() {
    let folder = folder();
    let dir = folder.path().join("c");
    let mut up = cluster();
    let mut up = Running::start(up.args(["up", "--port", "0", "--json", "--dir"]).arg(&dir));
    up.wait_for("up", |event| event["event"] == "up");
    let job = small_job(folder.path(), "");
    refused(run(&mut submit_local(&job, &dir, &[])), 4, &["a cluster runs in", "--dir"]);
    let mut second = cluster();
    second.args(["up", "--port", "0", "--dir"]).arg(&dir);
    refused(run(&mut second), 4, &["a cluster runs in"]);
    // The one that runs is as well as before.
    eventually("its worker is there", || {
        let mut workers = cluster();
        workers.args(["workers", "--json", "--dir"]).arg(&dir);
        run(&mut workers).expect_code(0).stdout.contains("\"w1\"").then_some(())
    });
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

#[test]
fn a_finished_job_is_told_again_and_a_full_disk_is_not_success() {
    let folder = folder();
    train_small(folder.path());
    let mut resume = cluster();
    resume.args(["resume", "small", "--local", "--json", "--dir"]).arg(folder.path().join("run"));
    let told = run(&mut resume).expect_code(0).last_json();
    assert_eq!(told["state"], "succeeded", "{told}");
    assert!(told["sha256"].is_string(), "{told}");

    let full = std::fs::File::options().write(true).open("/dev/full").expect("a full disk");
    let mut algorithms = cluster();
    let ended = algorithms.arg("algorithms").stdout(full).output().expect("runs");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
}

#[test]
fn a_wrong_cluster_token() {
    let folder = folder();
    let dir = folder.path().join("c");
    let mut up = cluster();
    let mut up = Running::start(up.args(["up", "--port", "0", "--json", "--dir"]).arg(&dir));
    let event = up.wait_for("up", |event| event["event"] == "up");
    let address = event["coordinators"][0].as_str().expect("an address").to_owned();
    let wrong = folder.path().join("token");
    std::fs::write(&wrong, "not-the-token\n").expect("written");
    let config = folder.path().join("cluster.toml");
    let tls = dir.join("tls");
    std::fs::write(
        &config,
        format!(
            "[cluster]\ndir = \"{0}/other\"\ntoken_file = \"{0}/token\"\n\
             [coordinator]\nmembers = [{{ node = 1, address = \"{address}\" }}]\n\
             [tls]\nca = \"{1}/ca.pem\"\ncertificate = \"{1}/host.pem\"\nkey = \"{1}/host.key\"\n",
            folder.path().display(),
            tls.display()
        ),
    )
    .expect("written");
    for (args, code) in [(["worker", "--name", "w9"].as_slice(), 6), (["jobs"].as_slice(), 6)] {
        let mut command = cluster();
        command.args(args).arg("--config").arg(&config);
        refused(run(&mut command), code, &["token"]);
    }
    // A client without a certificate of the cluster's authority is refused as well.
    let bare = std::fs::read_to_string(&config).expect("written");
    let bare = &bare[..bare.find("[tls]").expect("there")];
    std::fs::write(&config, bare).expect("written");
    let mut jobs = cluster();
    jobs.arg("jobs").arg("--config").arg(&config);
    let finished = run(&mut jobs);
    assert!([5, 6].contains(&finished.code), "{finished:?}");
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

#[test]
fn no_cluster_and_no_such_things() {
    let folder = folder();
    let mut jobs = cluster();
    jobs.args(["jobs", "--dir"]).arg(folder.path());
    refused(run(&mut jobs), 5, &["no cluster in", "cluster up"]);
    let mut serve = cluster();
    serve.args(["serve", "nothing", "--dir"]).arg(folder.path());
    refused(run(&mut serve), 3, &["no model `nothing`"]);
    let mut rank = cluster();
    rank.arg("rank");
    refused(run(&mut rank), 2, &["started by a worker"]);
}

#[test]
fn a_worker_without_the_store_s_key_is_refused_at_its_start() {
    let folder = folder();
    let store = folder.path().join("store");
    std::fs::create_dir(&store).expect("made");
    std::fs::write(
        store.join("encryption.json"),
        "{\"version\": 1, \"key_id\": \"0123456789abcdef\"}",
    )
    .expect("written");
    let config = folder.path().join("cluster.toml");
    let start = |encryption: &str| {
        let (dir, store) = (folder.path().display(), store.display());
        let text = format!(
            "[cluster]\ndir = \"{dir}/cluster\"\ntoken_file = \"{dir}/token\"\n\
             [store]\nuri = \"file://{store}\"\n{encryption}"
        );
        std::fs::write(&config, text).expect("written");
        run(cluster().args(["worker", "--name", "w1", "--config"]).arg(&config))
    };
    let parts = ["the store is encrypted under key `0123456789abcdef`", "[store.encryption]"];
    refused(start(""), 5, &[parts[0], "no key is configured", parts[1]]);
    let key = folder.path().join("key");
    std::fs::write(&key, "5a".repeat(32)).expect("written");
    let encryption = format!("[store.encryption]\nkey_file = \"{}\"\n", key.display());
    refused(start(&encryption), 5, &[parts[0], "the configured key is", parts[1]]);
}
