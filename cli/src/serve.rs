//! `treeboot serve IMAGE…`: images as the units of an iSCSI target, from any machine, without a coordinator.

mod access;
mod moved;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use sha2::{Digest, Sha256};
use treeboot_iscsi::scsi::alua::PortGroup;
use treeboot_iscsi::target::{
    Access, AddTargetError, BindError, LunSpec, ReservationFile, ReservationFileError, Server, ServerConfig,
    TargetOptions, TargetSpec, TargetStats,
};
use treeboot_types::{DATA_LUN, ISCSI_PORT, Iqn, TREEBOOT_AUTHORITY};

use self::access::AccessArgs;
use self::moved::MovedArgs;
use crate::failure::{Exit, Failure, chain, io_words};
use crate::import::{self, Format, OpenOptions, Source};
use crate::output;
use crate::signals::Signals;

/// How long initiators may take to log out when the server ends; then their sessions are closed.
const DRAIN: Duration = Duration::from_secs(3);

/// Serve images as an iSCSI target, without a coordinator
///
/// Takes the formats that 'image import' takes. Several images are the LUNs 0, 1 and so on of one target. Anybody who can
/// reach the portal may read them, and write to them with --writable, unless CHAP (--chap-user) or a list
/// (--allow-initiator) says otherwise; so the default is this machine only. SIGINT (Ctrl-C) or SIGTERM ends it in order.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot serve debian.qcow2\n  treeboot serve disk.raw data.raw --portal 0.0.0.0:3260 --portal [::]:3260 --writable\n  treeboot serve --redirect iqn.2026-11.org.example:disk=192.0.2.7:3260"
)]
pub(crate) struct ServeArgs {
    /// The images: files or block devices
    #[arg(value_name = "IMAGE", required_unless_present_any = ["for_now", "for_good"])]
    images: Vec<PathBuf>,
    /// Where to listen, an IPv6 address in brackets; may be given several times; port 0: any free one
    #[arg(long = "portal", value_name = "ADDR:PORT", value_parser = parse_portal, default_value = "127.0.0.1:3260")]
    portals: Vec<SocketAddr>,
    /// Let initiators write to the image itself (raw images only)
    #[arg(long, requires = "images")]
    writable: bool,
    /// The target's name [default: one made of the first image's file name]
    #[arg(long, value_name = "IQN", requires = "images")]
    name: Option<Iqn>,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    moved: MovedArgs,
    /// Logical block in bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = parse_block)]
    block_size: u32,
    /// Keep persistent reservations that ask for it (APTPL) in this file through a restart or a loss of power; once for each
    /// image, in their order
    #[arg(long, value_name = "FILE")]
    reservations: Vec<PathBuf>,
    /// Physical block to tell initiators, in bytes: 512 or 4096 [default: the logical block]. Raw images only
    #[arg(long, value_name = "BYTES", value_parser = parse_block)]
    physical_block_size: Option<u32>,
    /// Serve a LUN that is not thin: no UNMAP, no holes. With --writable the image's holes are filled first. Raw images only
    #[arg(long)]
    fully_allocated: bool,
    /// Write the addresses to this file as JSON once it serves; the file is removed at the end
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Where a format that qemu-img converts is put meanwhile [default: TMPDIR, else /var/tmp]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

/// What `--ready-file` holds.
#[derive(Debug, Serialize)]
struct Ready {
    portal: SocketAddr,
    portals: Vec<SocketAddr>,
    /// `null` where nothing but redirections is served.
    target: Option<String>,
    /// LUN by LUN, each by all portals.
    urls: Vec<String>,
}

/// Runs the verb until a signal comes.
pub(crate) async fn run(args: ServeArgs) -> Result<(), Failure> {
    let mut signals = Signals::catch()?;
    log();
    let access = args.access.read()?;
    let reservations = reservations(&args)?;
    let sources = tokio::select! {
        // Opening may take long, where a format is converted first.
        signal = signals.next() => return Err(Failure::new(Exit::Interrupted, signal)),
        opened = open_all(&args) => opened?,
    };
    let name = args
        .images
        .first()
        .map(|first| args.name.clone().unwrap_or_else(|| default_name(first)));
    // What needs no portal is told without one.
    args.moved.check(name.as_ref(), &[])?;
    let server = bind(&args.portals)?;
    args.moved.check(name.as_ref(), &server.local_addrs())?;
    args.moved.add(&server, &access)?;
    if let Some(name) = &name {
        add(&server, name, &sources, access, reservations)?;
    }
    let urls = urls(&server, name.as_ref(), sources.len());
    let ready = args
        .ready_file
        .as_deref()
        .map(|path| ReadyFile::write(path, &server, name.as_ref(), &urls))
        .transpose()?;
    output::print_text(&announcement(&args, &sources, &server, name.as_ref(), &urls))?;
    let begun = Instant::now();
    signals.next().await;
    drop(ready);
    let stats = name.and_then(|name| server.stats(&name)).unwrap_or_default();
    tokio::select! {
        () = server.shutdown(DRAIN) => {}
        // Whoever asks twice does not want to wait.
        _ = signals.next() => {}
    }
    if args.writable {
        for (image, source) in args.images.iter().zip(&sources) {
            let flushed = source.device.flush().await;
            flushed.map_err(|error| {
                Failure::new(
                    Exit::Failed,
                    format!("cannot make '{}' durable: {}", image.display(), chain(&error)),
                )
                .advice("see the kernel's log for errors of the disk; what was written last may be lost")
            })?;
        }
    }
    output::print_text(&summary(&stats, begun.elapsed()))
}

/// Problems of sessions go to standard error; `TREEBOOT_LOG=debug` tells more.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TREEBOOT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // Fails only where there is a subscriber already, and then that one does.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
}

async fn open_all(args: &ServeArgs) -> Result<Vec<Source>, Failure> {
    let mut sources = Vec::new();
    for image in &args.images {
        sources.push(open(args, image).await?);
    }
    Ok(sources)
}

async fn open(args: &ServeArgs, image: &Path) -> Result<Source, Failure> {
    let options = OpenOptions {
        format: None,
        scratch: args.scratch.clone().unwrap_or_else(import::default_scratch),
        block_bytes: args.block_size,
        physical_block_bytes: args.physical_block_size.unwrap_or(args.block_size),
        fully_allocated: args.fully_allocated,
        writable: args.writable,
    };
    let source = Source::open(image, &options).await?;
    let raw_only = args.fully_allocated || args.physical_block_size.is_some();
    if raw_only && source.format != Format::Raw {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "'{}' is a {} image; --fully-allocated and --physical-block-size are for raw images",
                image.display(),
                source.format
            ),
        )
        .advice("leave the option out"));
    }
    Ok(source)
}

fn bind(portals: &[SocketAddr]) -> Result<Server, Failure> {
    use std::io::ErrorKind;
    Server::bind(portals, ServerConfig::default()).map_err(|error| match &error {
        BindError::Listen { portal, source } => {
            let what = format!("cannot listen on {portal}: {}", io_words(source));
            match source.kind() {
                ErrorKind::AddrInUse => Failure::new(Exit::Exists, what).advice(
                    "another program has this port; choose another with --portal, or end that program",
                ),
                ErrorKind::AddrNotAvailable => Failure::new(Exit::NotFound, what)
                    .advice("give an address of this machine ('ip address' lists them), or 0.0.0.0 for all"),
                ErrorKind::PermissionDenied => Failure::new(Exit::Refused, what)
                    .advice("ports below 1024 are for root; choose a higher one"),
                _ => Failure::new(Exit::Failed, what),
            }
        }
        _ => Failure::new(Exit::Usage, chain(&error)).advice("give --portal ADDR:PORT"),
    })
}

/// Two servers of one image are two paths to it, so their groups of ports differ: by what they listen on.
fn port_group(server: &Server, name: &Iqn) -> PortGroup {
    let digest = Sha256::digest(urls(server, Some(name), 1).join(" "));
    PortGroup::new(u16::from_be_bytes([digest[0], digest[1]])).unwrap_or(PortGroup::MIN)
}

/// The files for reservations, by LUN.
fn reservations(args: &ServeArgs) -> Result<BTreeMap<u16, ReservationFile>, Failure> {
    if let Some(over) = args.reservations.get(args.images.len()) {
        return Err(Failure::new(
            Exit::Usage,
            format!("there is no image for the reservations in '{}'", over.display()),
        )
        .advice("give --reservations at most as often as images"));
    }
    let open = |(path, lun): (&PathBuf, u16)| Ok((lun, reservation_file(path)?));
    args.reservations.iter().zip(DATA_LUN..).map(open).collect()
}

fn reservation_file(path: &Path) -> Result<ReservationFile, Failure> {
    ReservationFile::open(path).map_err(|error| {
        let exit = match &error {
            ReservationFileError::InUse { .. } => Exit::Exists,
            ReservationFileError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Exit::NotFound
            }
            _ => Exit::Failed,
        };
        Failure::new(exit, chain(&error))
            .advice("give a file in a directory that exists; one process at a time can have it")
    })
}

fn lun(name: &Iqn, lun: u16, source: &Source) -> LunSpec {
    // The same name, LUN and size is the same disk, so that two servers of one image can be two paths to it.
    let bytes = source.device.geometry().bytes;
    let digest = match lun {
        DATA_LUN => Sha256::digest(format!("{name} {bytes}")),
        _ => Sha256::digest(format!("{name} {lun} {bytes}")),
    };
    let mut ident = [0; 16];
    ident.copy_from_slice(&digest[..16]);
    LunSpec {
        lun,
        device: Arc::clone(&source.device),
        serial: ident[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
        product: "treeboot image".into(),
        ident,
    }
}

fn add(
    server: &Server,
    name: &Iqn,
    sources: &[Source],
    access: Access,
    reservations: BTreeMap<u16, ReservationFile>,
) -> Result<(), Failure> {
    let luns = sources.iter().zip(DATA_LUN..);
    let spec = TargetSpec {
        name: name.clone(),
        luns: luns.map(|(source, number)| lun(name, number, source)).collect(),
        access,
    };
    let options = TargetOptions {
        port_group: port_group(server, name),
        reservations,
        ..TargetOptions::default()
    };
    server.add_target_with(spec, options).map_err(|error| {
        let failure = Failure::new(Exit::Failed, chain(&error));
        match error {
            AddTargetError::Reservations { .. } => failure.advice(
                "give the file that belongs to this target's name and size; to forget who reserved the disk, remove the file",
            ),
            _ => failure,
        }
    })
}

/// A file that says where the target is, and goes when this value is dropped.
#[derive(Debug)]
struct ReadyFile(PathBuf);

impl ReadyFile {
    /// Writes the file as a whole or not at all.
    fn write(path: &Path, server: &Server, name: Option<&Iqn>, urls: &[String]) -> Result<Self, Failure> {
        let io_error =
            |error: std::io::Error| Failure::io(format!("cannot write '{}'", path.display()), &error);
        let portals = server.local_addrs();
        let portal = *portals
            .first()
            .ok_or_else(|| Failure::new(Exit::Failed, "the server has no portal"))?;
        let ready = Ready {
            portal,
            portals,
            target: name.map(Iqn::to_string),
            urls: urls.to_vec(),
        };
        let text = serde_json::to_vec(&ready).map_err(|error| io_error(error.into()))?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io_error)?;
        std::io::Write::write_all(&mut file, &text).map_err(io_error)?;
        file.persist(path).map_err(|error| io_error(error.error))?;
        Ok(Self(path.into()))
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        // Somebody may have removed it; then there is nothing left to do.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn announcement(
    args: &ServeArgs,
    sources: &[Source],
    server: &Server,
    name: Option<&Iqn>,
    urls: &[String],
) -> String {
    let (how, read_only) = if args.writable {
        ("writable", "")
    } else {
        ("read-only", ",readonly=on")
    };
    let of = |(image, source): (&PathBuf, &Source)| {
        let bytes = output::bytes(source.device.geometry().bytes);
        format!("'{}' ({}, {bytes}, {how})", image.display(), source.format)
    };
    let images: Vec<_> = args.images.iter().zip(sources).map(of).collect();
    let portals = server.local_addrs();
    let mut text = match (name, images.as_slice()) {
        (Some(name), [image]) => format!("serving {image} as {name}\n"),
        (Some(name), images) => {
            let images = images.iter().zip(DATA_LUN..);
            let lines = images.map(|(image, lun)| format!("  LUN {lun}  {image}\n"));
            format!("serving as {name}\n{}", lines.collect::<String>())
        }
        (None, _) => {
            let lines = portals.iter().map(|portal| format!("  {}\n", shown(*portal)));
            format!("serving redirections only, at\n{}", lines.collect::<String>())
        }
    };
    text.extend(urls.iter().map(|url| format!("  {url}\n")));
    text.push_str(&args.access.announcement());
    text.push_str(&args.moved.announcement());
    if let (Some(first), Some(portal)) = (urls.first(), portals.first().map(|portal| shown(*portal))) {
        text.push_str(&format!(
            "attach it for instance with\n  \
             qemu-system-x86_64 -drive file={first},format=raw,if=virtio{read_only}\n  \
             iscsi-ls -s iscsi://{portal}\n  \
             iscsiadm -m discovery -t sendtargets -p {portal}\n",
        ));
    }
    text.push_str("Ctrl-C ends it\n");
    text
}

fn summary(stats: &TargetStats, elapsed: Duration) -> String {
    format!(
        "served {} read and {} written in {} over {}\n",
        output::bytes(stats.read_bytes),
        output::bytes(stats.written_bytes),
        output::plural(usize::try_from(stats.commands).unwrap_or(usize::MAX), "command"),
        output::duration(elapsed),
    )
}

/// The URLs of so many LUNs, each by all portals.
fn urls(server: &Server, name: Option<&Iqn>, luns: usize) -> Vec<String> {
    let Some(name) = name else { return Vec::new() };
    let portals = server.local_addrs();
    let of = |lun| portals.iter().map(move |portal| url(*portal, name, lun));
    (DATA_LUN..).take(luns).flat_map(of).collect()
}

fn url(portal: SocketAddr, name: &Iqn, lun: u16) -> String {
    format!("iscsi://{}/{name}/{lun}", shown(portal))
}

/// A portal that listens on all addresses is shown by the address that the machine would send from.
fn shown(portal: SocketAddr) -> SocketAddr {
    if portal.ip().is_unspecified() {
        SocketAddr::new(outward_address(portal.ip()), portal.port())
    } else {
        portal
    }
}

/// The address of this machine towards others. To connect a UDP socket only looks the route up: nothing is sent, and
/// the addresses are those reserved for documentation (RFC 5737, RFC 3849).
fn outward_address(any: IpAddr) -> IpAddr {
    let (local, remote, fallback): (IpAddr, IpAddr, IpAddr) = match any {
        IpAddr::V4(_) => (
            any,
            Ipv4Addr::new(192, 0, 2, 1).into(),
            Ipv4Addr::LOCALHOST.into(),
        ),
        IpAddr::V6(_) => (
            any,
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
            Ipv6Addr::LOCALHOST.into(),
        ),
    };
    let found = UdpSocket::bind((local, 0)).and_then(|socket| {
        socket.connect((remote, ISCSI_PORT))?;
        socket.local_addr()
    });
    found.map_or(fallback, |address| address.ip())
}

/// A target's name made of a file's: what an iSCSI name cannot hold becomes `-`.
fn default_name(image: &Path) -> Iqn {
    const LONGEST: usize = 100;
    let stem = image
        .file_stem()
        .map(|stem| stem.to_string_lossy().to_ascii_lowercase())
        .unwrap_or_default();
    let allowed = |c: char| {
        if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') {
            c
        } else {
            '-'
        }
    };
    let stem: String = stem.chars().map(allowed).take(LONGEST).collect();
    let name = |stem: &str| Iqn::new(&format!("{TREEBOOT_AUTHORITY}:serve:{stem}"));
    name(&stem)
        .or_else(|_| name("image"))
        .expect("the authority and 'image' make a valid name")
}

/// Reads `ADDR:PORT`, `ADDR`, `[ADDR6]:PORT` or `[ADDR6]`.
fn parse_portal(text: &str) -> Result<SocketAddr, String> {
    if let Ok(portal) = text.parse::<SocketAddr>() {
        return Ok(portal);
    }
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if let Some(Ok(address)) = bracketed.map(str::parse::<Ipv6Addr>) {
        return Ok(SocketAddr::new(address.into(), ISCSI_PORT));
    }
    if let Ok(address) = text.parse::<Ipv4Addr>() {
        return Ok(SocketAddr::new(address.into(), ISCSI_PORT));
    }
    // "::1:3260" is an address by itself, but was hardly meant as one.
    Err(if text.matches(':').count() > 1 {
        format!("'{text}' is not ADDR:PORT; write an IPv6 address in brackets: [::1]:{ISCSI_PORT}")
    } else {
        format!(
            "'{text}' is not ADDR:PORT; write for instance 127.0.0.1:{ISCSI_PORT} or 0.0.0.0:{ISCSI_PORT}"
        )
    })
}

fn parse_block(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err(format!("'{text}' is not a block size; give 512 or 4096")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_is_an_address_with_or_without_a_port() {
        for (text, portal) in [
            ("127.0.0.1:3261", "127.0.0.1:3261"),
            ("10.0.0.1", "10.0.0.1:3260"),
            ("[::1]:0", "[::1]:0"),
            ("[fd00::1]", "[fd00::1]:3260"),
        ] {
            assert_eq!(parse_portal(text).unwrap().to_string(), portal);
        }
        for bad in [
            "",
            "::1",
            "::1:3260",
            "host:3260",
            "127.0.0.1:x",
            "127.0.0.1:65536",
            "[::1",
            "1.2.3",
        ] {
            assert!(parse_portal(bad).is_err(), "{bad}");
        }
        assert!(parse_portal("::1:3260").unwrap_err().contains("brackets"));
    }

    #[test]
    fn a_targets_name_is_made_of_what_an_iscsi_name_may_hold() {
        for (path, name) in [
            (
                "/images/Debian 12.qcow2",
                "iqn.2026-11.dev.treeboot:serve:debian-12",
            ),
            ("übung.raw", "iqn.2026-11.dev.treeboot:serve:-bung"),
            ("..", "iqn.2026-11.dev.treeboot:serve:"),
        ] {
            assert!(default_name(Path::new(path)).as_str().starts_with(name), "{path}");
        }
    }

    #[test]
    fn a_portal_on_all_addresses_is_shown_by_one_that_can_be_reached() {
        let name = Iqn::new("iqn.2026-11.a:b").unwrap();
        let shown = url("0.0.0.0:3260".parse().unwrap(), &name, 0);
        assert!(
            !shown.contains("0.0.0.0") && shown.ends_with(":3260/iqn.2026-11.a:b/0"),
            "{shown}"
        );
        assert_eq!(
            url("[::1]:1".parse().unwrap(), &name, 3),
            "iscsi://[::1]:1/iqn.2026-11.a:b/3"
        );
    }
}
