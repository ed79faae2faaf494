//! Serves one disk over one FUSE connection: reads requests, asks the disk, answers.
//!
//! What is under way when this process dies was read from the connection and never answered. The successor, which is given the same connection, asks the
//! kernel to send it again (Linux 6.9 and later); each request may be carried out twice, because it says what and where, not how much further.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use treeboot_block::{BlockDevice, BlockError};

use super::wire::{self, Operation};

/// A write that finds no room waits, and is tried again after this: room comes back when somebody makes it, which takes a person seconds.
const ROOM_PAUSE: Duration = Duration::from_millis(500);
/// The same for bytes that no parent gives at the moment; the paths below have waited already.
const PARENT_PAUSE: Duration = Duration::from_millis(100);
/// How long requests may wait for a parent before they fail, as on the kernel plane.
const PARENT_LIMIT: Duration = Duration::from_secs(60);
/// How long the end waits for requests under way. What is not done then is sent again to the successor.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A disk being served.
pub(super) struct Serving {
    connection: Arc<AsyncFd<OwnedFd>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Serving {
    /// Serves `disk` over `connection`, which another process may have served before.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn start(
        connection: OwnedFd,
        disk: Arc<dyn BlockDevice>,
        vm: String,
        taken_over: bool,
    ) -> std::io::Result<Self> {
        #[expect(
            deprecated,
            reason = "unsound only for what closes its descriptor meanwhile, which `OwnedFd` does not; its successor is unsafe to call"
        )]
        let connection = Arc::new(AsyncFd::new(connection)?);
        if taken_over && let Err(errno) = rustix::io::write(connection.as_fd(), &wire::resend()) {
            tracing::warn!(
                vm, %errno,
                "this kernel does not send again what the last agent left unanswered (Linux 6.9 does); if it died in the middle of a request, \
                 that request waits for ever: detach the device then"
            );
        }
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (stopped, requests) = (stop.clone(), tasks.clone());
        let served = Arc::clone(&connection);
        tasks.spawn(async move {
            let all = answer_all(&served, &disk, &vm, &requests, &stopped);
            tokio::select! {
                () = stopped.cancelled() => {}
                () = all => tracing::debug!(vm, "the connection of the device ended"),
            }
        });
        Ok(Self {
            connection,
            stop,
            tasks,
        })
    }

    /// Another descriptor of the connection, for one who holds it.
    ///
    /// # Errors
    /// The operating system's: too many open files.
    pub(super) fn connection(&self) -> std::io::Result<OwnedFd> {
        self.connection.get_ref().try_clone()
    }

    /// Ends it; the connection lives on where somebody else holds it.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        // Requests that wait for room end with `stop`; what is at the disk is waited for.
        let _left_to_the_successor = tokio::time::timeout(END_LIMIT, self.tasks.wait()).await;
    }
}

async fn answer_all(
    connection: &Arc<AsyncFd<OwnedFd>>,
    disk: &Arc<dyn BlockDevice>,
    vm: &str,
    requests: &TaskTracker,
    stop: &CancellationToken,
) {
    let mut buffer = vec![0; wire::BUFFER_BYTES];
    loop {
        let Ok(mut ready) = connection.readable().await else {
            return;
        };
        let bytes = match rustix::io::read(connection.as_fd(), &mut buffer) {
            Ok(0) => return,
            Ok(bytes) => bytes,
            Err(Errno::AGAIN) => {
                ready.clear_ready();
                continue;
            }
            // A request that was interrupted before it was read.
            Err(Errno::INTR | Errno::NOENT) => continue,
            // Unmounted.
            Err(_) => return,
        };
        let Some(request) = wire::parse(&buffer[..bytes]) else {
            tracing::warn!(vm, bytes, "a message of the kernel that is not understood");
            continue;
        };
        let unique = request.unique;
        let size = disk.geometry().bytes;
        let next = match request.operation {
            Operation::Init { minor, abilities } => Next::Answer(Ok(wire::init(minor, abilities))),
            Operation::Attributes => Next::Answer(Ok(wire::attributes(size))),
            Operation::Open => Next::Answer(Ok(wire::open())),
            Operation::Room => Next::Answer(Ok(wire::room(size))),
            Operation::Nothing => Next::Answer(Ok(Vec::new())),
            Operation::Refused => Next::Answer(Err(Errno::OPNOTSUPP)),
            Operation::Unknown => Next::Answer(Err(Errno::NOSYS)),
            Operation::Unanswered => continue,
            Operation::Read { offset, bytes } => {
                let bytes = bytes.min(size.saturating_sub(offset) as usize);
                Next::Ask(Work::Read { offset, bytes })
            }
            Operation::Write { offset, data } => {
                let data = data.to_vec();
                Next::Ask(Work::Write { offset, data })
            }
            Operation::Sync => Next::Ask(Work::Sync),
            Operation::Discard { offset, bytes } => Next::Ask(Work::Discard { offset, bytes }),
        };
        match next {
            Next::Answer(answer) => send(connection, unique, answer),
            Next::Ask(work) => spawn(connection, disk, requests, stop, unique, work),
        }
    }
}

fn send(connection: &AsyncFd<OwnedFd>, unique: u64, answer: Result<Vec<u8>, Errno>) {
    let reply = match answer {
        Ok(body) => wire::reply(unique, None, &body),
        Err(errno) => wire::reply(unique, Some(errno.raw_os_error()), &[]),
    };
    // It takes an answer at once or not at all: the request was interrupted, or the file system is gone.
    let _nobody_waits = rustix::io::write(connection.as_fd(), &reply);
}

/// What becomes of a request.
enum Next {
    Answer(Result<Vec<u8>, Errno>),
    Ask(Work),
}

/// What a disk is asked.
enum Work {
    Read { offset: u64, bytes: usize },
    Write { offset: u64, data: Vec<u8> },
    Sync,
    Discard { offset: u64, bytes: u64 },
}

fn spawn(
    connection: &Arc<AsyncFd<OwnedFd>>,
    disk: &Arc<dyn BlockDevice>,
    requests: &TaskTracker,
    stop: &CancellationToken,
    unique: u64,
    work: Work,
) {
    let (connection, disk, stop) = (Arc::clone(connection), Arc::clone(disk), stop.clone());
    requests.spawn(async move {
        if let Some(answer) = patiently(&disk, &work, &stop).await {
            send(&connection, unique, answer);
        }
    });
}

/// Carries a request out, again and again where what it lacks can come back. `None`: this process ends, and its successor answers.
async fn patiently(
    disk: &Arc<dyn BlockDevice>,
    work: &Work,
    stop: &CancellationToken,
) -> Option<Result<Vec<u8>, Errno>> {
    let began = tokio::time::Instant::now();
    loop {
        let error = match once(disk, work).await {
            Ok(body) => return Some(Ok(body)),
            Err(error) => error,
        };
        let pause = match error {
            BlockError::NoSpace { .. } => ROOM_PAUSE,
            BlockError::Unavailable { .. } if began.elapsed() < PARENT_LIMIT => PARENT_PAUSE,
            other => return Some(Err(errno(&other))),
        };
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn once(disk: &Arc<dyn BlockDevice>, work: &Work) -> Result<Vec<u8>, BlockError> {
    match work {
        Work::Read { offset, bytes } => {
            let mut data = vec![0; *bytes];
            disk.read(*offset, &mut data).await?;
            Ok(data)
        }
        Work::Write { offset, data } => {
            disk.write(*offset, data).await?;
            Ok(wire::written(data.len()))
        }
        Work::Sync => disk.flush().await.map(|()| Vec::new()),
        Work::Discard { offset, bytes } => disk.discard(*offset, *bytes).await.map(|()| Vec::new()),
    }
}

fn errno(error: &BlockError) -> Errno {
    match error {
        BlockError::OutOfRange { .. } => Errno::INVAL,
        BlockError::ReadOnly => Errno::ROFS,
        BlockError::NoSpace { .. } => Errno::NOSPC,
        BlockError::Unsupported { .. } => Errno::OPNOTSUPP,
        BlockError::Corrupt { .. } => Errno::BADMSG,
        BlockError::Unavailable { .. } | BlockError::Io { .. } => Errno::IO,
    }
}
