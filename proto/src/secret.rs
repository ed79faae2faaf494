//! Messages that hold secrets, printed without them.

use std::fmt;

use crate::v1;

impl fmt::Debug for v1::ExportKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExportKey(…)")
    }
}

impl fmt::Debug for v1::EdgeSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EdgeSecret({} at {})", self.target, self.host)
    }
}

impl fmt::Debug for v1::DiskSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskSecret({})", self.user)
    }
}
