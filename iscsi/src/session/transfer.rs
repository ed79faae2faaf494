//! Collecting the data of a write: immediate, unsolicited, and asked for by R2T (RFC 7143 §4.2.5.2, §11.7, §11.8).

/// What the login agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferLimits {
    /// Data may come with the command.
    pub immediate_data: bool,
    /// Unsolicited Data-Out is forbidden.
    pub initial_r2t: bool,
    /// Most unsolicited bytes.
    pub first_burst_bytes: u32,
    /// Most bytes asked for by one R2T.
    pub max_burst_bytes: u32,
    /// R2Ts that may be outstanding.
    pub max_outstanding_r2t: u16,
}

/// Why data were not the ones to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Data that nobody allowed.
    #[error("unsolicited data that the login forbids, or more of them than agreed on")]
    Unsolicited,
    /// A tag that no R2T gave out.
    #[error("Data-Out with the tag {ttt:#x}, which no R2T in force has")]
    Tag {
        /// The tag.
        ttt: u32,
    },
    /// Not the place, or not the number, that is next.
    #[error("Data-Out out of order: offset {offset}, DataSN {data_sn}")]
    Order {
        /// Its offset.
        offset: u32,
        /// Its number.
        data_sn: u32,
    },
    /// The sequence ended too early or went on too long.
    #[error("a sequence of Data-Out that ends at {end} instead of {expected}")]
    Length {
        /// Where it ended.
        end: u32,
        /// Where it had to.
        expected: u32,
    },
}

/// An R2T to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Solicitation {
    /// Its number.
    pub r2t_sn: u32,
    /// First byte.
    pub offset: u32,
    /// Length in bytes.
    pub bytes: u32,
}

#[derive(Debug, Clone, Copy)]
struct Burst {
    ttt: u32,
    next: u32,
    end: u32,
    data_sn: u32,
}

/// The data of one command. Bytes are kept as they come, so memory follows what the initiator really sent.
#[derive(Debug)]
pub struct Transfer {
    limits: TransferLimits,
    /// What the initiator means to send.
    expected: u32,
    /// What the command takes of it; the rest is received and dropped.
    wanted: u32,
    data: Vec<u8>,
    /// Unsolicited data go on.
    unsolicited: Option<Burst>,
    bursts: Vec<Burst>,
    /// Up to where the data came or were asked for.
    asked: u32,
    r2t_sn: u32,
}

impl Transfer {
    /// Begins with the command itself: `expected` bytes are to come, `wanted` of them are of use, `immediate` came
    /// with it, and unsolicited ones follow unless `final_`.
    ///
    /// # Errors
    /// Data that the login forbids.
    pub fn begin(
        limits: TransferLimits,
        expected: u32,
        wanted: u32,
        immediate: &[u8],
        final_: bool,
        mut buffer: Vec<u8>,
    ) -> Result<Self, TransferError> {
        let first_burst = limits.first_burst_bytes.min(expected);
        let came = u32::try_from(immediate.len()).unwrap_or(u32::MAX);
        if came > first_burst || came > 0 && !limits.immediate_data || !final_ && limits.initial_r2t {
            return Err(TransferError::Unsolicited);
        }
        buffer.clear();
        let mut transfer = Self {
            limits,
            expected,
            wanted: wanted.min(expected),
            data: buffer,
            unsolicited: (!final_).then_some(Burst {
                ttt: crate::pdu::NO_TAG,
                next: came,
                end: first_burst,
                data_sn: 0,
            }),
            bursts: Vec::new(),
            asked: came,
            r2t_sn: 0,
        };
        transfer.keep(immediate);
        Ok(transfer)
    }

    fn keep(&mut self, data: &[u8]) {
        let room = (self.wanted as usize).saturating_sub(self.data.len());
        self.data.extend_from_slice(&data[..data.len().min(room)]);
    }

    /// Takes a Data-Out.
    ///
    /// # Errors
    /// [`TransferError`]; the command is to fail once no more data are due.
    pub fn take(
        &mut self,
        ttt: u32,
        data_sn: u32,
        offset: u32,
        data: &[u8],
        final_: bool,
    ) -> Result<(), TransferError> {
        let solicited = ttt != crate::pdu::NO_TAG;
        let burst = match solicited {
            false => self.unsolicited.as_mut().ok_or(TransferError::Unsolicited)?,
            true => self
                .bursts
                .iter_mut()
                .find(|burst| burst.ttt == ttt)
                .ok_or(TransferError::Tag { ttt })?,
        };
        if offset != burst.next || data_sn != burst.data_sn {
            return Err(TransferError::Order { offset, data_sn });
        }
        let end = u64::from(offset) + data.len() as u64;
        let expected = burst.end;
        // Unsolicited data may end early, data asked for may not.
        if end > u64::from(expected) || final_ && solicited && end != u64::from(expected) {
            return Err(TransferError::Length {
                end: u32::try_from(end).unwrap_or(u32::MAX),
                expected,
            });
        }
        burst.next = end as u32;
        burst.data_sn += 1;
        // A burst asked for is over with its last byte, F or not.
        let over = final_ || solicited && burst.next == burst.end;
        if !solicited {
            self.asked = burst.next;
        }
        if over {
            match solicited {
                false => self.unsolicited = None,
                true => self.bursts.retain(|burst| burst.ttt != ttt),
            }
        }
        self.keep(data);
        Ok(())
    }

    /// The next R2T that may be sent; `ttt` is the tag that it will bear.
    pub fn solicit(&mut self, ttt: u32) -> Option<Solicitation> {
        let outstanding = self.bursts.len() >= usize::from(self.limits.max_outstanding_r2t.max(1));
        if self.unsolicited.is_some() || outstanding || self.asked >= self.wanted {
            return None;
        }
        let bytes = (self.wanted - self.asked).min(self.limits.max_burst_bytes);
        let solicitation = Solicitation {
            r2t_sn: self.r2t_sn,
            offset: self.asked,
            bytes,
        };
        self.bursts.push(Burst {
            ttt,
            next: self.asked,
            end: self.asked + bytes,
            data_sn: 0,
        });
        self.asked += bytes;
        self.r2t_sn += 1;
        Some(solicitation)
    }

    /// Everything that the command takes is there, and nothing more is due.
    pub fn is_complete(&self) -> bool {
        self.unsolicited.is_none() && self.bursts.is_empty() && self.asked >= self.wanted
    }

    /// No data are due that the initiator was allowed to send; R2Ts may still be missing.
    pub fn is_quiet(&self) -> bool {
        self.unsolicited.is_none() && self.bursts.is_empty()
    }

    /// Nothing more is wanted of the command: only what was already allowed is still received, and dropped.
    pub fn give_up(&mut self) {
        self.wanted = 0;
        self.data.clear();
    }

    /// Bytes kept.
    pub fn kept(&self) -> usize {
        self.data.len()
    }

    /// How many R2Ts were made: ExpDataSN of the response.
    pub fn solicitations(&self) -> u32 {
        self.r2t_sn
    }

    /// What the initiator means to send.
    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// The data.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }
}
