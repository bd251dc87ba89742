//! A host that is not fit for work gets none, says why, and works again once it is mended.

mod common;

use std::path::Path;

use common::{Running, cluster, eventually, free_ports, run, small_job};
use nix::sys::signal::Signal;
use serde_json::Value;

/// cluster.toml of a coordinator and a worker whose prices are known.
fn write_config(folder: &Path) -> std::path::PathBuf {
    let port = free_ports(1)[0];
    let text = format!(
        "[cluster]\ndir = \"{0}/cluster\"\ntoken_file = \"{0}/token\"\n\
         [coordinator]\nmembers = [{{ node = 1, address = \"127.0.0.1:{port}\" }}]\n\
         [store]\nuri = \"file://{0}/store\"\n\
         [worker]\nname = \"w1\"\nslots = 1\nmarket = \"spot\"\nprice_per_hour = 3600.0\n\
         on_demand_price_per_hour = 14400.0\n",
        folder.display(),
    );
    std::fs::write(folder.join("token"), "0123456789abcdef0123456789abcdef").expect("written");
    let path = folder.join("cluster.toml");
    std::fs::write(&path, text).expect("written");
    path
}

#[test]
fn a_host_that_lost_its_data_folder_gets_no_rank_until_it_is_mended() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let config = write_config(folder);
    let start = |role: &str| {
        let mut command = cluster();
        Running::start(command.arg(role).arg("--config").arg(&config))
    };
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--config").arg(&config))
    };
    let coordinator = start("coordinator");
    let worker = start("worker");
    let view = || {
        let listed = ask(&["workers"]);
        (listed.code == 0 && !listed.stdout.is_empty()).then(|| listed.last_json())
    };
    let is = |state: &str| view().filter(|view| view["state"] == state);
    eventually("the worker", || is("attached"));

    let mut submit = cluster();
    let job = small_job(folder, "");
    submit.arg("submit").arg(job).args(["--json", "--follow", "--set", "stop.max_steps=300"]);
    let mut following = Running::start(submit.arg("--config").arg(&config));
    following.wait_for_step(5);

    // The host vanishes, and comes back without its disk.
    worker.signal(Signal::SIGSTOP);
    following.wait_for("it is lost", |event| {
        let reason = event["reason"].as_str().unwrap_or_default();
        event["phase"] == "queued" && reason.contains("worker lost")
    });
    let data = folder.join("cluster/worker-w1");
    let aside = folder.join("aside");
    std::fs::rename(&data, &aside).expect("moved");
    std::fs::write(&data, "no folder").expect("written");
    worker.signal(Signal::SIGCONT);
    let unhealthy = eventually("its check fails", || is("unhealthy"));
    let reason = unhealthy["reason"].as_str().expect("a reason");
    assert!(reason.contains("the data folder"), "{unhealthy}");
    assert!(reason.contains("Not a directory"), "{unhealthy}");
    assert!(reason.contains("it was lost: no word from `w1`"), "{unhealthy}");
    assert!(!reason.contains("the self-test"), "the rest of the host is fit: {unhealthy}");
    let waiting = following.wait_for("the job waits for it", |event| {
        let reason = event["reason"].as_str().unwrap_or_default();
        event["phase"] == "queued"
            && reason.contains("waits for slots: `w1` failed its health check")
    });
    assert_eq!(waiting["generation"], 1, "{waiting}");
    assert_eq!(is("unhealthy").map(|view| view["used"].clone()), Some(Value::from(0)));

    // Mended, it gets work without anybody's doing.
    std::fs::remove_file(&data).expect("removed");
    std::fs::rename(&aside, &data).expect("moved");
    following.finish().expect_code(0);
    assert_eq!(view().expect("listed")["state"], "attached");
    let job = ask(&["job", "small"]).expect_code(0).last_json();
    let history = job["status"]["history"].as_array().expect("a history");
    let tells = |text: &str| {
        let is_it = |moment: &Value| moment["text"].as_str().is_some_and(|t| t.contains(text));
        assert!(history.iter().any(is_it), "{text}: {history:#?}");
    };
    tells("the host of `w1` failed its check: the data folder");
    tells("the host of `w1` passed its check: it takes tasks");

    // A slot of this host costs 1 a second, and 4 on demand.
    let cost = &job["cost"];
    let seconds = cost["spot_rank_seconds"].as_f64().expect("a number");
    let paid = cost["paid"].as_f64().expect("a number");
    assert!(seconds > 0.0 && (paid / seconds - 1.0).abs() < 1e-6, "{cost}");
    assert!((cost["saved_percent"].as_f64().expect("a number") - 75.0).abs() < 1e-6, "{cost}");
    assert_eq!(cost["unpriced_rank_seconds"], 0.0, "{cost}");
    let mut shown = cluster();
    let shown = run(shown.args(["job", "small", "--config"]).arg(&config)).expect_code(0);
    assert!(shown.stdout.contains("saved, 75.0 %"), "{shown:?}");

    for part in [worker, coordinator] {
        part.signal(Signal::SIGTERM);
        part.finish().expect_code(0);
    }
}
