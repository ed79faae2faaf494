//! Hosts in network namespaces of their own, each with one link to a bridge in a namespace that is ours too: links can be cut, and
//! their bytes are counted by the kernel. Needs root and `ip` (iproute2).
//!
//! The machine's own network is never touched. A test works from within the hub's namespace: [`Network::enter`].

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::scratch::Scratch;

/// The network's addresses: 10.0.0.1 beside 10.0.0.10 on purpose, which a substring match takes for each other.
const HUB: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 254));

/// The hub's address on the control network.
const CONTROL_HUB: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 255, 0, 254));
/// Guests' addresses count from here, beyond those of hosts in namespaces.
const FIRST_GUEST: usize = 10;

/// A bridge with hosts around it.
#[derive(Debug)]
pub struct Network {
    hub: String,
    hosts: usize,
}

/// Bytes that passed a host's link.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkBytes {
    /// Into the host.
    pub received: u64,
    /// Out of the host.
    pub sent: u64,
}

impl Network {
    /// Makes the namespaces and links; they end with the scratch folder.
    ///
    /// # Errors
    /// Not root, or `ip` failed.
    pub fn new(scratch: &Scratch, hosts: usize) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // After the folder, whose name nobody else has: runs in several namespaces of pids share the network namespaces' names.
        let folder = scratch.path().file_name().unwrap_or_default().to_string_lossy();
        let place = match folder.strip_prefix("treeboot-") {
            Some(random) => random.to_owned(),
            // A folder of somebody's choice, which another may choose too.
            None => format!("{folder}{}", std::process::id()),
        };
        let hub = format!("tb{place}-{count}");
        let network = Self { hub, hosts };
        scratch.own_namespace(&network.hub)?;
        ip(&format!("netns add {}", network.hub))?;
        let hub = &network.hub;
        ip(&format!("-n {hub} link set lo up"))?;
        // No spanning tree, so that a link that comes back carries frames at once.
        ip(&format!("-n {hub} link add hub type bridge stp_state 0"))?;
        ip(&format!("-n {hub} addr add {HUB}/24 dev hub"))?;
        ip(&format!("-n {hub} link set hub up"))?;
        for host in 0..hosts {
            let namespace = network.namespace(host);
            scratch.own_namespace(&namespace)?;
            ip(&format!("netns add {namespace}"))?;
            ip(&format!(
                "-n {hub} link add port{host} type veth peer name eth0 netns {namespace}"
            ))?;
            ip(&format!("-n {hub} link set port{host} master hub up"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
            ip(&format!(
                "-n {namespace} addr add {}/24 dev eth0",
                network.address(host)
            ))?;
            ip(&format!("-n {namespace} link set eth0 up"))?;
        }
        Ok(network)
    }

    /// Moves the calling thread into the hub, for good: whatever it starts from now on (processes, sockets, threads) is there.
    ///
    /// # Errors
    /// The right to do so is missing.
    pub fn enter(&self) -> Result<()> {
        enter(&self.hub)
    }

    /// The name of a host's namespace.
    #[must_use]
    pub fn namespace(&self, host: usize) -> String {
        format!("{}-h{host}", self.hub)
    }

    /// A host's address, from 10.0.0.1.
    #[must_use]
    pub fn address(&self, host: usize) -> IpAddr {
        let last = u8::try_from(host + 1).unwrap_or(u8::MAX);
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
    }

    /// Adds a tap to the bridge, for a guest with a kernel of its own; gives its name in the hub's namespace.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn add_tap(&self, index: usize) -> Result<String> {
        let (hub, tap) = (&self.hub, format!("tap{index}"));
        ip(&format!("-n {hub} tuntap add dev {tap} mode tap"))?;
        ip(&format!("-n {hub} link set {tap} master hub up"))?;
        Ok(tap)
    }

    /// Adds the control network: a bridge of its own in the hub's namespace, for links that are neither shaped nor cut.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn add_control(&self) -> Result<()> {
        let hub = &self.hub;
        ip(&format!("-n {hub} link add control type bridge stp_state 0"))?;
        ip(&format!("-n {hub} addr add {CONTROL_HUB}/24 dev control"))?;
        ip(&format!("-n {hub} link set control up"))?;
        Ok(())
    }

    /// Adds a tap to the control network; gives its name.
    ///
    /// # Errors
    /// `ip` failed, or there is no control network.
    pub fn add_control_tap(&self, index: usize) -> Result<String> {
        let (hub, tap) = (&self.hub, format!("control{index}"));
        ip(&format!("-n {hub} tuntap add dev {tap} mode tap"))?;
        ip(&format!("-n {hub} link set {tap} master control up"))?;
        Ok(tap)
    }

    /// The address of a guest of this number, from 1: 10.0.0.11.
    ///
    /// # Errors
    /// There is none left.
    pub fn guest_address(&self, number: usize) -> Result<IpAddr> {
        Ok(IpAddr::V4(Ipv4Addr::new(10, 0, 0, guest(number)?)))
    }

    /// Its address on the control network.
    ///
    /// # Errors
    /// There is none left.
    pub fn guest_control_address(&self, number: usize) -> Result<IpAddr> {
        Ok(IpAddr::V4(Ipv4Addr::new(10, 255, 0, guest(number)?)))
    }

    /// What `tc` is told for a link of this speed. Its burst holds what passes in 10 ms, the longest tick of a guest's kernel.
    #[must_use]
    pub fn shape(rate_mbit: u32) -> String {
        let burst_kb = (u64::from(rate_mbit) * 10 / 8).max(128);
        format!("tbf rate {rate_mbit}mbit burst {burst_kb}kb latency 50ms")
    }

    /// Gives a host's link this speed, in both directions.
    ///
    /// # Errors
    /// `tc` failed.
    pub fn shape_host(&self, host: usize, rate_mbit: u32) -> Result<()> {
        let shape = Self::shape(rate_mbit);
        let (hub, namespace) = (&self.hub, self.namespace(host));
        run(
            "tc",
            &format!("-n {hub} qdisc replace dev port{host} root {shape}"),
        )?;
        run(
            "tc",
            &format!("-n {namespace} qdisc replace dev eth0 root {shape}"),
        )?;
        Ok(())
    }

    /// Gives a tap this speed towards its guest; the other direction is the guest's to shape.
    ///
    /// # Errors
    /// `tc` failed.
    pub fn shape_tap(&self, index: usize, rate_mbit: u32) -> Result<()> {
        let (hub, shape) = (&self.hub, Self::shape(rate_mbit));
        run(
            "tc",
            &format!("-n {hub} qdisc replace dev tap{index} root {shape}"),
        )?;
        Ok(())
    }

    /// Undoes [`Network::shape_host`].
    ///
    /// # Errors
    /// The link was not shaped, or `tc` failed.
    pub fn unshape_host(&self, host: usize) -> Result<()> {
        let (hub, namespace) = (&self.hub, self.namespace(host));
        run("tc", &format!("-n {hub} qdisc del dev port{host} root"))?;
        run("tc", &format!("-n {namespace} qdisc del dev eth0 root"))?;
        Ok(())
    }

    /// Undoes [`Network::shape_tap`].
    ///
    /// # Errors
    /// As [`Network::unshape_host`].
    pub fn unshape_tap(&self, index: usize) -> Result<()> {
        run("tc", &format!("-n {} qdisc del dev tap{index} root", self.hub))?;
        Ok(())
    }

    /// Takes a guest's tap out of the bridge: frames are lost, no connection is told, as with [`Network::cut`].
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut_tap(&self, index: usize) -> Result<()> {
        // Not by taking the tap down: user-mode Linux gives a link up for good whose tap refused a frame.
        ip(&format!("-n {} link set tap{index} nomaster", self.hub))?;
        Ok(())
    }

    /// Undoes [`Network::cut_tap`].
    ///
    /// # Errors
    /// `ip` failed.
    pub fn mend_tap(&self, index: usize) -> Result<()> {
        ip(&format!("-n {} link set tap{index} master hub", self.hub))?;
        Ok(())
    }

    /// The name of the hub's namespace.
    #[must_use]
    pub fn hub_namespace(&self) -> &str {
        &self.hub
    }

    /// The hub's address, where the coordinator listens.
    #[must_use]
    pub fn hub_address(&self) -> IpAddr {
        HUB
    }

    /// Takes a host's link down: frames are lost, no connection is told.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut(&self, host: usize) -> Result<()> {
        // At the hub's end, so that the host keeps its address and its routes, as with a pulled cable at the switch.
        ip(&format!("-n {} link set port{host} down", self.hub))?;
        Ok(())
    }

    /// Undoes [`Network::cut`].
    ///
    /// # Errors
    /// `ip` failed.
    pub fn mend(&self, host: usize) -> Result<()> {
        ip(&format!("-n {} link set port{host} up", self.hub))?;
        Ok(())
    }

    /// Bytes that passed a host's link, headers of all layers included.
    ///
    /// # Errors
    /// `ip` failed or its answer is not understood.
    pub fn link_bytes(&self, host: usize) -> Result<LinkBytes> {
        self.bytes_of(&format!("port{host}"))
    }

    /// Bytes that passed a guest's tap.
    ///
    /// # Errors
    /// As [`Network::link_bytes`].
    pub fn tap_bytes(&self, index: usize) -> Result<LinkBytes> {
        self.bytes_of(&format!("tap{index}"))
    }

    fn bytes_of(&self, link: &str) -> Result<LinkBytes> {
        let answer = ip(&format!("-n {} -s -j link show {link}", self.hub))?;
        let links: serde_json::Value = serde_json::from_str(&answer).context("ip's answer is not JSON")?;
        let bytes = |direction: &str| {
            links[0]["stats64"][direction]["bytes"]
                .as_u64()
                .with_context(|| format!("no {direction} bytes in {links}"))
        };
        // What the hub's end receives, the host sent.
        Ok(LinkBytes {
            received: bytes("tx")?,
            sent: bytes("rx")?,
        })
    }

    /// How many hosts there are.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.hosts
    }
}

/// Moves the calling thread into a namespace, for good.
///
/// # Errors
/// There is none of this name, or the right to do so is missing.
pub fn enter(namespace: &str) -> Result<()> {
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path).with_context(|| format!("could not open {path}"))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("could not enter {path}"))
}

fn guest(number: usize) -> Result<u8> {
    // .200 and above are other guests', .254 is the hub.
    u8::try_from(FIRST_GUEST + number)
        .ok()
        .filter(|last| *last < 200)
        .with_context(|| format!("a network has no address for guest {number}"))
}

fn ip(arguments: &str) -> Result<String> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .with_context(|| format!("could not start {program} (apt-get install iproute2)"))?;
    if !output.status.success() {
        bail!(
            "{program} {arguments}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
