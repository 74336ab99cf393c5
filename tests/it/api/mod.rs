//! A file for each verb: what it does when it is used as the interface says.

mod api_keys;
mod decrypt;
mod encrypt;
mod health;
mod keys;
mod rewrap;
mod tenants;
