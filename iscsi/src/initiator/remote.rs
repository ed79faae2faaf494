//! A LUN of some target as a block device.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use treeboot_block::{BlockDevice, BlockError, Extent, Geometry, IoFuture, Provisioning};

use super::error::{CommandError, ConnectError, with_causes};
use super::session::{Session, SessionOptions};

/// Bytes of zeroes that a discard writes at once.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// How long, and how often, a unit between two states of access (ALUA) is asked again: a relay or an array has settled
/// by then, and a guest's own limit on a command is three times that.
const TRANSITION: Duration = Duration::from_secs(10);
const TRANSITION_PAUSE: Duration = Duration::from_millis(50);

/// Repeats what a unit refuses only because it is between two states of access.
async fn settled<T, F>(mut work: impl FnMut() -> F) -> Result<T, CommandError>
where
    F: Future<Output = Result<T, CommandError>>,
{
    let until = tokio::time::Instant::now() + TRANSITION;
    loop {
        match work().await {
            Err(CommandError::Sense(sense))
                if sense.is_transition() && tokio::time::Instant::now() < until =>
            {
                tokio::time::sleep(TRANSITION_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// One LUN over one session. When the session ends, every operation fails with [`BlockError::Unavailable`]: there
/// is no reconnect; [`PathGroup`](super::PathGroup) is for that.
#[derive(Debug)]
pub struct RemoteDevice {
    session: Session,
    lun: u16,
    geometry: Geometry,
}

impl RemoteDevice {
    /// Logs in and asks for the unit's size and write protection.
    ///
    /// # Errors
    /// [`ConnectError`]; [`ConnectError::Lun`] where the unit is missing or no disk of 512 or 4096-byte blocks.
    pub async fn connect(options: SessionOptions, lun: u16) -> Result<Self, ConnectError> {
        let (portal, target) = (options.portal.clone(), options.target.clone());
        let session = Session::connect(options).await?;
        let unusable = |source| ConnectError::Lun {
            portal,
            target,
            lun,
            source,
        };
        match settled(|| geometry(&session, lun)).await {
            Ok(geometry) => Ok(Self {
                session,
                lun,
                geometry,
            }),
            Err(source) => Err(unusable(source)),
        }
    }

    /// The session, for questions that a block device does not answer.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Logs out.
    pub async fn close(self) {
        self.session.close().await;
    }

    fn error(&self, error: CommandError, offset: u64, bytes: u64) -> BlockError {
        let what = format!(
            "LUN {} of {} at {}: {}",
            self.lun,
            self.session.target(),
            self.session.portal(),
            with_causes(&error)
        );
        match error {
            CommandError::Sense(sense) if sense.is_no_space() => BlockError::NoSpace { offset, bytes },
            CommandError::Sense(sense) if sense.is_write_protected() => BlockError::ReadOnly,
            CommandError::Sense(sense) if sense.is_medium_error() => BlockError::Corrupt { what },
            _ => BlockError::Unavailable { what },
        }
    }

    fn check_write(&self, offset: u64, bytes: u64) -> Result<(), BlockError> {
        self.check_range(offset, bytes)?;
        if self.geometry.read_only {
            return Err(BlockError::ReadOnly);
        }
        Ok(())
    }

    async fn put(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        let bytes = data.len() as u64;
        if bytes == 0 {
            return Ok(());
        }
        let done = settled(|| self.session.write(self.lun, offset, data.clone())).await;
        done.map_err(|error| self.error(error, offset, bytes))
    }
}

async fn geometry(session: &Session, lun: u16) -> Result<Geometry, CommandError> {
    session.test_unit_ready(lun).await?;
    let capacity = session.capacity(lun).await?;
    if !matches!(capacity.block_bytes, 512 | 4096) || session.inquiry(lun).await?.device_type != 0 {
        return Err(CommandError::Answer {
            command: "READ CAPACITY and INQUIRY (a disk with blocks of 512 or 4096 bytes is needed)",
        });
    }
    Ok(Geometry {
        bytes: capacity.bytes,
        block_bytes: capacity.block_bytes,
        physical_block_bytes: capacity.physical_block_bytes,
        read_only: session.is_write_protected(lun).await?,
        // A discard is a write of zeroes here, which gives nothing back.
        thin: false,
    })
}

impl BlockDevice for RemoteDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            let whole = buf.len() as u64;
            self.check_range(offset, whole)?;
            let mut at = offset;
            // Pieces of a gibibyte keep lengths within the 32 bits of a command; the session splits further.
            for piece in buf.chunks_mut(1 << 30) {
                let data = settled(|| self.session.read(self.lun, at, piece.len() as u32)).await;
                piece.copy_from_slice(&data.map_err(|error| self.error(error, offset, whole))?);
                at += piece.len() as u64;
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> IoFuture<'a, ()> {
        Box::pin(async move {
            self.check_write(offset, data.len() as u64)?;
            self.put(offset, Bytes::copy_from_slice(data)).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let done = settled(|| self.session.flush(self.lun)).await;
            done.map_err(|error| self.error(error, 0, self.geometry.bytes))
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.check_write(offset, bytes)?;
            let mut at = offset;
            while at < offset + bytes {
                let some = (offset + bytes - at).min(ZEROES.len() as u64);
                self.put(at, Bytes::from_static(&ZEROES).slice(..some as usize))
                    .await?;
                at += some;
            }
            Ok(())
        })
    }

    fn extent(&self, offset: u64, bytes: u64) -> IoFuture<'_, Extent> {
        Box::pin(async move {
            self.check_range(offset, bytes)?;
            Ok(Extent {
                bytes,
                state: Provisioning::Mapped,
            })
        })
    }
}
