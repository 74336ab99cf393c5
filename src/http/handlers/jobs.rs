//! `/v1/jobs`, `/v1/tenants/{tenant}/rewrap-keys` and `/v1/kek-use`

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::deks::Dek;
use super::{PageQuery, Path, Query, dek_id, name, next_cursor};
use crate::http::SharedState;
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::Problem;
use crate::store::JobRecord;
use crate::tenant::KekId;

/// Work that takes a while, and how far it has come.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct Job {
    /// Its id.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    #[serde(rename = "job_id")]
    id: String,
    /// `rewrap-keys`: bringing a tenant's wrapped data keys up to its ring and the master keys' materials. `shred`:
    /// destroying data keys after a waiting period.
    #[schema(example = "rewrap-keys")]
    kind: &'static str,
    /// For which tenant.
    #[schema(example = "acme")]
    tenant: String,
    /// For what of it: empty for all, `key:NAME`, or `dek:ID`.
    #[schema(example = "")]
    target: String,
    /// `waiting`, `running`, `done` or `cancelled`.
    #[schema(example = "running")]
    state: &'static str,
    /// How many data keys it is about, as far as that is known.
    #[schema(example = 5000)]
    total: u64,
    /// How many of them are done.
    #[schema(example = 1250)]
    done: u64,
    /// How many tries have failed so far; what failed is tried again.
    #[schema(example = 0)]
    errors: u64,
    /// Why the last one failed.
    last_error: Option<String>,
    /// Data keys done in a second.
    #[schema(example = 48.5)]
    rate_per_sec: Option<f64>,
    /// When it was asked for, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    created_at: String,
    /// When the work began.
    started_at: Option<String>,
    /// When this was written last.
    #[schema(example = "2026-11-23T12:00:26Z")]
    updated_at: String,
    /// When it ended.
    finished_at: Option<String>,
}

impl From<JobRecord> for Job {
    fn from(job: JobRecord) -> Self {
        Self {
            rate_per_sec: job.rate_per_sec(),
            id: job.id,
            kind: job.kind.name(),
            tenant: job.tenant.to_string(),
            target: job.target.name(),
            state: job.state.name(),
            total: job.total,
            done: job.done,
            errors: job.errors,
            last_error: job.last_error,
            created_at: job.created_at.to_string(),
            started_at: job.started_at.map(|at| at.to_string()),
            updated_at: job.updated_at.to_string(),
            finished_at: job.finished_at.map(|at| at.to_string()),
        }
    }
}

/// A page of jobs.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct JobList {
    items: Vec<Job>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

/// Which jobs.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct JobsQuery {
    /// Only this tenant's. Without it, all: that needs the verb `operate`.
    tenant: Option<String>,
    /// The cursor from the page before (`next`); none for the first page.
    after: Option<String>,
    /// How many at most: 1 to 1,000, 100 where nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// Which KEK.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::http) struct KekUseQuery {
    /// The master key: an ARN, or `local:NAME`.
    #[param(example = "local:main")]
    kek: String,
    /// The cursor from the page before (`next`); none for the first page.
    after: Option<String>,
    /// How many data keys to list at most: 1 to 1,000, 100 where nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// What depends on a master key.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct KekUse {
    /// Which.
    #[schema(example = "local:main")]
    kek: String,
    /// How many data keys have a wrapped form under it. With zero here and in `rings`, the registry does not need it
    /// any more; embedded envelopes that were not rewrapped need it where there is no registry to help.
    #[schema(example = 0)]
    deks: u64,
    /// When the oldest of these forms was made.
    oldest_wrapped_at: Option<String>,
    /// How many tenants have it in their ring: new data keys are wrapped under it.
    #[schema(example = 0)]
    rings: u64,
    /// How many tenants had it in their ring before.
    #[schema(example = 1)]
    former_rings: u64,
    /// Whether the registry still needs it: `deks` or `rings` is not zero.
    #[schema(example = false)]
    needed: bool,
    /// The data keys, by id.
    items: Vec<Dek>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

/// List jobs
///
/// The newest first. Needs the verb `operate`, or with `tenant` the verb `admin` in it.
#[utoipa::path(get, path = "/v1/jobs", operation_id = "listJobs", tag = "administration", params(JobsQuery),
    responses((status = 200, description = "A page of jobs", body = JobList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Query(query): Query<JobsQuery>,
) -> Result<Json<JobList>, Problem> {
    let page = PageQuery { after: query.after, limit: query.limit }.page(|cursor| Ok(cursor.to_owned()))?;
    let limit = page.limit;
    let jobs = match &query.tenant {
        Some(tenant) => state.operations.list_jobs_of(&caller.admin_of(tenant)?, page).await?,
        None => state.operations.list_jobs(&caller.operate()?, page).await?,
    };
    let next = next_cursor(&jobs, limit, |job| job.id.clone());
    Ok(Json(JobList { items: jobs.into_iter().map(Into::into).collect(), next }))
}

/// Look at a job
///
/// Needs the verb `admin` in its tenant, or `operate`.
#[utoipa::path(get, path = "/v1/jobs/{job}", operation_id = "readJob", tag = "administration",
    params(("job" = String, Path, description = "The job's id", example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")),
    responses((status = 200, description = "The job", body = Job)))]
pub(in crate::http) async fn read(
    State(state): State<SharedState>,
    caller: Caller,
    Path(job): Path<String>,
) -> Result<Json<Job>, Problem> {
    let job = state.operations.job(&job, |tenant| caller.admin_of(tenant.as_str()).is_ok()).await?;
    Ok(Json(job.into()))
}

/// Rewrap a tenant's data keys
///
/// Brings them up to the tenant's ring and the master keys' current materials now, which otherwise happens by itself.
/// Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/rewrap-keys", operation_id = "rewrapKeys", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    responses((status = 202, description = "The job", body = Job)))]
pub(in crate::http) async fn rewrap_keys(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
) -> Result<Response, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let job = state.operations.rewrap_keys(&permit).await?;
    Ok((StatusCode::ACCEPTED, Json(Job::from(job))).into_response())
}

/// What still needs a master key?
///
/// Which data keys, of whatever tenant, and since when. Needs the verb `operate`.
#[utoipa::path(get, path = "/v1/kek-use", operation_id = "readKekUse", tag = "administration", params(KekUseQuery),
    responses((status = 200, description = "What depends on it", body = KekUse)))]
pub(in crate::http) async fn kek_use(
    State(state): State<SharedState>,
    caller: Caller,
    Query(query): Query<KekUseQuery>,
) -> Result<Json<KekUse>, Problem> {
    let permit = caller.operate()?;
    let kek: KekId = name(&query.kek)?;
    let page = PageQuery { after: query.after, limit: query.limit }.page(dek_id)?;
    let limit = page.limit;
    let (of, deks) = state.operations.kek_use(&permit, &kek, page).await?;
    let next = next_cursor(&deks, limit, |stored| stored.dek.id.to_string());
    Ok(Json(KekUse {
        kek: kek.to_string(),
        deks: of.deks,
        oldest_wrapped_at: of.oldest_wrapped_at.map(|at| at.to_string()),
        rings: of.rings,
        former_rings: of.former_rings,
        needed: of.deks > 0 || of.rings > 0,
        items: deks.into_iter().map(Into::into).collect(),
        next,
    }))
}
