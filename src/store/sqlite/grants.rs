//! Grants.

use async_trait::async_trait;

use super::{SqliteStore, failure};
use crate::store::{GrantRecord, GrantStore, StoreError, rows, sql};
use crate::tenant::TenantId;

#[async_trait]
impl GrantStore for SqliteStore {
    async fn insert_grant(&self, grant: &GrantRecord) -> Result<(), StoreError> {
        let (id, tenant) = (&grant.id, &grant.tenant);
        sqlx::query(sql::INSERT_GRANT)
            .bind(id)
            .bind(tenant.as_str())
            .bind(&grant.principal)
            .bind(rows::verbs_text(&grant.verbs))
            .bind(rows::grant_scope_text(&grant.scope)?)
            .bind(grant.created_at.unix_ms())
            .bind(grant.created_by.as_str())
            .execute(&self.writer)
            .await
            .map_err(failure::naming(|| format!("grant {id}"), || format!("tenant {tenant}")))?;
        Ok(())
    }

    async fn grants(
        &self,
        tenant: Option<&TenantId>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<GrantRecord>, StoreError> {
        let query = match tenant {
            Some(tenant) => sqlx::query(sql::GRANTS_OF_TENANT).bind(tenant.as_str()),
            None => sqlx::query(sql::GRANTS),
        };
        let query = query.bind(after.unwrap_or("")).bind(i64::from(limit));
        let found = query.fetch_all(&self.readers).await.map_err(failure::of)?;
        found.iter().map(rows::grant).collect()
    }

    async fn count_grants(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        let query = sqlx::query(sql::COUNT_GRANTS).bind(tenant.as_str());
        let row = query.fetch_one(&self.readers).await.map_err(failure::of)?;
        rows::counted(&row)
    }

    async fn delete_grant(&self, tenant: &TenantId, id: &str) -> Result<(), StoreError> {
        let query = sqlx::query(sql::DELETE_GRANT).bind(tenant.as_str()).bind(id);
        let deleted = query.execute(&self.writer).await.map_err(failure::of)?;
        if deleted.rows_affected() == 0 {
            return Err(StoreError::Missing(format!("grant {id} in tenant {tenant}").into()));
        }
        Ok(())
    }
}
