//! Mode pages (SPC-4 §7.5, SBC-3 §6.5): caching, control, informational exceptions.

use super::sense::Sense;

/// What MODE SELECT can change. It lasts as long as the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Modes {
    /// WCE: writes may be answered before they are durable.
    pub write_cache: bool,
    /// SWP: the initiator write-protected the unit.
    pub write_protect: bool,
}

impl Default for Modes {
    fn default() -> Self {
        Self {
            write_cache: true,
            write_protect: false,
        }
    }
}

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const EXCEPTIONS: u8 = 0x1c;
const ALL: u8 = 0x3f;

/// Which values MODE SENSE shows.
const CHANGEABLE: u8 = 1;
const DEFAULT: u8 = 2;
const SAVED: u8 = 3;

/// What MODE SENSE asks.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The ten-byte form.
    pub long: bool,
    /// DBD.
    pub no_block_descriptors: bool,
    /// PC.
    pub control: u8,
    /// Page code.
    pub page: u8,
    /// Subpage code.
    pub subpage: u8,
}

impl Modes {
    /// The pages as bytes; `control` is the PC field.
    fn page(self, code: u8, control: u8) -> Option<Vec<u8>> {
        let modes = match control {
            DEFAULT => Self::default(),
            _ => self,
        };
        let changeable = control == CHANGEABLE;
        match code {
            CACHING => {
                let mut page = vec![0; 20];
                (page[0], page[1]) = (CACHING, 18);
                page[2] = if changeable || modes.write_cache { 0x04 } else { 0 };
                Some(page)
            }
            CONTROL => {
                let mut page = vec![0; 12];
                (page[0], page[1]) = (CONTROL, 10);
                if changeable {
                    page[4] = 0x08;
                } else {
                    page[2] = 0x20; // TST 1: a task set of its own for each I_T nexus
                    page[3] = 0x10; // QUEUE ALGORITHM MODIFIER 1: unrestricted reordering
                    page[4] = if modes.write_protect { 0x08 } else { 0 };
                    (page[8], page[9]) = (0xff, 0xff); // BUSY TIMEOUT: unlimited
                }
                Some(page)
            }
            EXCEPTIONS => {
                let mut page = vec![0; 12];
                (page[0], page[1]) = (EXCEPTIONS, 10);
                Some(page)
            }
            _ => None,
        }
    }

    /// MODE SENSE data. `protected`: the unit cannot be written, whatever SWP says.
    ///
    /// # Errors
    /// The [`Sense`] of a page that does not exist or of saved values.
    pub fn sense(
        self,
        asked: Asked,
        protected: bool,
        blocks: u64,
        block_bytes: u32,
    ) -> Result<Vec<u8>, Sense> {
        if asked.control == SAVED {
            return Err(Sense::NO_SAVING);
        }
        let mut pages = Vec::new();
        match (asked.page, asked.subpage) {
            (ALL, 0 | 0xff) => {
                for code in [CACHING, CONTROL, EXCEPTIONS] {
                    pages.extend(self.page(code, asked.control).unwrap_or_default());
                }
            }
            (code, 0 | 0xff) => match self.page(code, asked.control) {
                Some(page) => pages = page,
                None => return Err(Sense::cdb_field(2, Some(5))),
            },
            _ => return Err(Sense::cdb_field(3, None)),
        }
        let descriptor = match asked.no_block_descriptors {
            true => Vec::new(),
            false => {
                let mut descriptor = vec![0; 8];
                descriptor[..4].copy_from_slice(&u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes());
                descriptor[4..].copy_from_slice(&block_bytes.to_be_bytes());
                descriptor
            }
        };
        // WP and DPOFUA.
        let device = if protected || self.write_protect {
            0x90
        } else {
            0x10
        };
        let body = descriptor.len() + pages.len();
        let mut out = if asked.long {
            let mut header = vec![0; 8];
            header[..2].copy_from_slice(&((body + 6) as u16).to_be_bytes());
            header[3] = device;
            header[7] = descriptor.len() as u8;
            header
        } else {
            vec![(body + 3) as u8, 0, device, descriptor.len() as u8]
        };
        out.extend(descriptor);
        out.extend(pages);
        Ok(out)
    }

    /// What the parameter list of a MODE SELECT makes of it.
    ///
    /// # Errors
    /// The [`Sense`] to send; nothing has changed then.
    pub fn select(self, long: bool, parameters: &[u8]) -> Result<Self, Sense> {
        let header = if long { 8 } else { 4 };
        if parameters.is_empty() {
            return Ok(self);
        }
        let head = parameters.get(..header).ok_or(Sense::PARAMETER_LENGTH)?;
        let descriptors = match long {
            true => usize::from(u16::from_be_bytes([head[6], head[7]])),
            false => usize::from(head[3]),
        };
        let mut rest = parameters
            .get(header + descriptors..)
            .ok_or(Sense::PARAMETER_LENGTH)?;
        let mut modes = self;
        while let [code, length, ..] = *rest {
            let at = (parameters.len() - rest.len()) as u16;
            let page = rest
                .get(..2 + usize::from(length))
                .ok_or(Sense::PARAMETER_LENGTH)?;
            let code = code & 0x7f;
            let (Some(current), Some(mask)) = (modes.page(code, 0), modes.page(code, CHANGEABLE)) else {
                return Err(Sense::parameter_field(at));
            };
            if page.len() != current.len() {
                return Err(Sense::parameter_field(at + 1));
            }
            for (offset, ((new, old), mask)) in page.iter().zip(&current).zip(&mask).enumerate().skip(2) {
                if (new ^ old) & !mask != 0 {
                    return Err(Sense::parameter_field(at + offset as u16));
                }
            }
            match code {
                CACHING => modes.write_cache = page[2] & 0x04 != 0,
                CONTROL => modes.write_protect = page[4] & 0x08 != 0,
                _ => {}
            }
            rest = &rest[page.len()..];
        }
        Ok(modes)
    }
}
