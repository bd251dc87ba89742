//! A worker's network is cut, and mended: the job goes on without it, and with it again. Through the
//! shipped binary; needs root and iproute2, for a network namespace.

mod common;

use std::path::Path;
use std::process::Command;

use common::{
    Finished, Running, cluster, eventually, free_ports, roles, run, small_job, submit_local,
    weights_digest,
};
use serde_json::Value;

/// A network namespace with one link to this one; gone when dropped.
struct Apart {
    name: String,
    link: String,
    /// This end's address, and the other's.
    addresses: [String; 2],
}

fn ip(arguments: &str) -> Result<String, String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

impl Apart {
    /// None, loudly, where this user may make none.
    fn make() -> Option<Self> {
        let id = std::process::id();
        let (name, link) = (format!("cohort-{id}"), format!("co{id}"));
        if let Err(why) = ip(&format!("netns add {name}")) {
            eprintln!("SKIPPED: a cut network: no network namespace can be made here: {why}");
            return None;
        }
        let addresses = [1, 2].map(|host| format!("10.213.{}.{host}", id % 250));
        let apart = Self { name, link, addresses };
        let Self { name, link, addresses: [here, there] } = &apart;
        for arguments in [
            format!("link add {link} type veth peer name inside netns {name}"),
            format!("address add {here}/24 dev {link}"),
            format!("link set {link} up"),
            format!("-n {name} address add {there}/24 dev inside"),
            format!("-n {name} link set inside up"),
            format!("-n {name} link set lo up"),
            format!("-n {name} route add default via {here}"),
        ] {
            ip(&arguments).unwrap_or_else(|why| panic!("ip {arguments}: {why}"));
        }
        Some(apart)
    }

    fn inside(&self, arguments: &str) -> String {
        ip(&format!("-n {} {arguments}", self.name)).expect("the namespace is there")
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.link));
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

fn start_worker(folder: &Path, name: &str, apart: &Apart, port: u16, is_inside: bool) -> Running {
    let [here, there] = &apart.addresses;
    let data_address = if is_inside { there } else { here };
    let more = format!("[worker]\ndata_address = \"{data_address}\"\n");
    let config = roles::write_config(folder, name, 1, (here, &[port]), &more);
    let binary = cluster();
    let mut command = match is_inside {
        true => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &apart.name]).arg(binary.get_program());
            command
        }
        false => binary,
    };
    command.args(["worker", "--slots", "1", "--name", name, "--config"]).arg(config);
    Running::start(&mut command)
}

#[test]
fn a_worker_that_is_cut_off_comes_back_and_the_result_keeps_its_bits() {
    let Some(apart) = Apart::make() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let extra = "[resources]\nranks = { min = 1, max = 2 }\n[recovery]\nmax_failures = 100\n";
    let job = small_job(folder, extra);
    let sets = ["stop.max_steps=600"];
    let undisturbed = run(&mut submit_local(&job, &folder.join("undisturbed"), &sets));
    let expected = weights_digest(&undisturbed.expect_code(0));

    roles::make_certificates(folder);
    let port = free_ports(1)[0];
    let here = &apart.addresses[0];
    let client = roles::write_config(folder, "c1", 1, (here, &[port]), "");
    let _coordinator = roles::start_coordinator(&client);
    let _near = start_worker(folder, "near", &apart, port, false);
    let _far = start_worker(folder, "far", &apart, port, true);
    let ask = |args: &[&str]| -> Finished {
        let mut command = cluster();
        run(command.args(args).arg("--config").arg(&client))
    };
    let workers = || ask(&["workers", "--json"]).stdout.lines().count();
    eventually("two workers", || (workers() == 2).then_some(()));
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--set", sets[0], "--config"]);
    let mut following = Running::start(submit.arg(&client));
    following.wait_for_step(20);

    let mut strikes = cluster();
    strikes.args(["chaos", "run", "--faults", "cut", "--seed", "2", "--json", "--every", "2s"]);
    let mut strikes = Running::start(strikes.args(["--duration", "6s", "--config"]).arg(&client));
    strikes.wait_for("a cut", |event| event["event"] == "fault" && event["missed"].is_null());
    let ended = strikes.finish().expect_code(0);
    let end = ended.last_json();
    assert!(end["struck"].as_u64() >= Some(1), "{ended:?}");
    // Mended: the link is up and the route that went with it is back.
    assert!(apart.inside("-o link show inside").contains("state UP"));
    assert!(apart.inside("route show").contains(&format!("default via {here}")));

    following.finish().expect_code(0);
    let shown = ask(&["job", "small", "--json"]).expect_code(0).last_json();
    let status: &Value = &shown["status"];
    assert_eq!(status["model"]["sha256"], expected.as_str(), "{status}");
    eventually("both workers are there", || {
        let listed = ask(&["workers", "--json"]).expect_code(0).stdout;
        let all = listed.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        (all.filter(|worker| worker["state"] == "attached").count() == 2).then_some(())
    });
}
