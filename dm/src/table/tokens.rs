//! Reading a table line word by word, so that every error names the line and the word.

use std::str::FromStr;

use super::TableError;
use crate::{DeviceNumber, Sectors};

/// No target of ours has more of anything that is counted in its table; a larger count is a broken text.
const MAX_COUNT: usize = 1024;

pub(super) struct Tokens<'a> {
    line: &'a str,
    words: std::str::SplitAsciiWhitespace<'a>,
}

impl<'a> Tokens<'a> {
    pub(super) fn new(line: &'a str) -> Self {
        Self {
            line,
            words: line.split_ascii_whitespace(),
        }
    }

    pub(super) fn next(&mut self, what: &'static str) -> Result<&'a str, TableError> {
        self.words.next().ok_or_else(|| TableError::Missing {
            line: self.line.into(),
            what,
        })
    }

    pub(super) fn peek(&self) -> Option<&'a str> {
        self.words.clone().next()
    }

    pub(super) fn parsed<T: FromStr>(&mut self, what: &'static str) -> Result<T, TableError> {
        let token = self.next(what)?;
        token.parse().map_err(|_| self.invalid(what, token))
    }

    pub(super) fn number(&mut self, what: &'static str) -> Result<u64, TableError> {
        self.parsed(what)
    }

    pub(super) fn sectors(&mut self, what: &'static str) -> Result<Sectors, TableError> {
        self.number(what).map(Sectors)
    }

    pub(super) fn device(&mut self, what: &'static str) -> Result<DeviceNumber, TableError> {
        self.parsed(what)
    }

    pub(super) fn count(&mut self, what: &'static str) -> Result<usize, TableError> {
        let token = self.next(what)?;
        token
            .parse()
            .ok()
            .filter(|&n| n <= MAX_COUNT)
            .ok_or_else(|| self.invalid(what, token))
    }

    /// A count and as many words.
    pub(super) fn list(&mut self, what: &'static str) -> Result<Vec<&'a str>, TableError> {
        let count = self.count(what)?;
        (0..count).map(|_| self.next(what)).collect()
    }

    pub(super) fn invalid(&self, what: &'static str, token: &str) -> TableError {
        TableError::Invalid {
            line: self.line.into(),
            what,
            token: token.into(),
        }
    }

    pub(super) fn end(&mut self) -> Result<(), TableError> {
        match self.words.next() {
            None => Ok(()),
            Some(token) => Err(TableError::Trailing {
                line: self.line.into(),
                token: token.into(),
            }),
        }
    }
}
