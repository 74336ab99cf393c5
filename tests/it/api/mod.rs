//! A file for each verb: what it does when it is used as the interface says.

mod encrypt;
