//! The targets of the protocol: what a client sends before and after an export is agreed.

pub mod handshake;
pub mod structured;
pub mod transmission;
