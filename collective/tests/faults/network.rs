//! Network namespaces joined by a bridge: one place per rank, each behind a link that can be cut.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

/// A hub with the bridge, and so many places.
pub struct Network {
    /// Unique on this host.
    name: String,
    places: u32,
}

impl Network {
    /// # Errors
    /// Why this process may not make namespaces, in the system's words.
    pub fn new(places: u32) -> Result<Self, String> {
        let name = format!("cohort-faults-{}", std::process::id());
        // From here on dropped, also where it is made by half.
        let network = Self { name, places };
        let hub = network.hub();
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "bridge", "up"])?;
        (0..places).for_each(|place| network.add(place));
        Ok(network)
    }

    /// Makes a place, whose end of its link is `eth0`.
    fn add(&self, place: u32) {
        let (hub, namespace, port) = (self.hub(), self.namespace(place), port(place));
        let address = format!("{}/24", Self::address(place));
        let commands: [&[&str]; 5] = [
            &["netns", "add", &namespace],
            &[
                "-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns",
                &namespace,
            ],
            &["-n", &hub, "link", "set", &port, "master", "bridge", "up"],
            &["-n", &namespace, "address", "add", &address, "dev", "eth0"],
            &["-n", &namespace, "link", "set", "eth0", "up"],
        ];
        commands.into_iter().for_each(|command| ip(command).unwrap());
    }

    pub fn namespace(&self, place: u32) -> String {
        format!("{}-{place}", self.name)
    }

    pub fn address(place: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 231, 0, 1 + place as u8))
    }

    /// Nothing passes between a place and the others from now on.
    pub fn cut(&self, place: u32) {
        ip(&["-n", &self.hub(), "link", "set", &port(place), "down"]).unwrap();
    }

    pub fn mend(&self, place: u32) {
        ip(&["-n", &self.hub(), "link", "set", &port(place), "up"]).unwrap();
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let places = (0..self.places).map(|place| self.namespace(place));
        for namespace in places.chain([self.hub()]) {
            // One that was never made cannot be removed.
            let _ = ip(&["netns", "delete", &namespace]);
        }
    }
}

/// The hub's end of a place's link.
fn port(place: u32) -> String {
    format!("port{place}")
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.map_err(|error| format!("`ip`: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("`ip {}`: {}", arguments.join(" "), said.trim()))
}
